"""`tailorbird generate`: let a model continue a text."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_json, working
from tailorbird.errors import SettingsError

EXAMPLE = 'Example: tailorbird generate out/demo "def read_lines(path):" --max-tokens 64'


def generate(
    model: options.Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", callback=options.check_text, help="The text to continue.")
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens to write at most.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token each time."),
    ] = 0.0,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is written.")] = False,
    bits: options.Bits = None,
    json: options.Json = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
) -> None:
    """Continue a text with a model, compressed or not."""
    if stream and json:
        raise SettingsError(
            "--stream and --json together", "one of them", "leave out --stream to get one JSON object"
        )
    from tailorbird import api

    screen = sys.stdout

    def show(piece: str) -> None:
        screen.write(piece)
        screen.flush()

    if stream:
        show(prompt)
    with working():
        result = api.generate(
            model,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            bits=bits,
            seed=seed,
            device=device,
            on_text=show if stream else None,
        )
    if json:
        print_json(plain(result))
    elif stream:
        show("\n")
    else:
        show(f"{prompt}{result.text}\n")
