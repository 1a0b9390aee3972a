"""Tokens per second with each kind of guesses beside none, in one engine after the other, in turns.

Prompts are real text: documents of `--text`, each one's beginning. 1, 4 and 16 sequences decode at once,
greedily and at temperature 1, in engines that guess nothing, guess from the text itself, and guess with each
of `--draft` beside that. Every round all engines get the same requests, in alternating order, and must write
the same tokens. Medians over the rounds; checked and right guesses of each guesser stand beside them.

    python benchmarks/serve_guess.py [--model demo] [--text FILE] [--draft self:skip HEADS DIR] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from machine import add_quiet_option, require_quiet, write_result
from tailorbird.calibrate.documents import read_documents
from tailorbird.model.load import load_tokenizer
from tailorbird.model.location import demo_text
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import Request, Sampling

SEQUENCES = (1, 4, 16)
TEMPERATURES = (0.0, 1.0)
PROMPT, NEW = 64, 96


def prompts_of(model: str, text: Path, count: int) -> list[tuple[int, ...]]:
    """Beginnings of documents, or of their further pages where these are few."""
    tokenizer = load_tokenizer(model)
    encoded = [tokenizer(document.text)["input_ids"] for document in read_documents(text, tokenizer)]
    found: list[tuple[int, ...]] = []
    for page in range(10_000):
        pieces = [tuple(ids[page * PROMPT : (page + 1) * PROMPT]) for ids in encoded]
        found += [piece for piece in pieces if len(piece) == PROMPT]
        if len(found) >= count:
            return found[:count]
    raise SystemExit(f"{text} has no {count} pieces of {PROMPT} tokens")


class Served:
    """One engine, and what it wrote."""

    def __init__(self, model: str, draft: str | None, speculative: bool) -> None:
        options = EngineOptions(
            model, max_sequences=max(SEQUENCES), speculative=speculative, draft=draft, threads=None
        )
        self.engine, self.requests = Engine(options, log=lambda _: None), 0

    def run(self, prompts: list[tuple[int, ...]], temperature: float, new: int) -> dict[str, Any]:
        """Tokens of each text, and seconds and steps from when all prompts were read."""
        order = {}
        for number, prompt in enumerate(prompts):
            self.requests += 1
            order[str(self.requests)] = number
            sampling = Sampling(temperature=temperature, seed=number, ignore_end=True)
            self.engine.add(Request(str(self.requests), prompt, new, sampling, tenant=str(self.requests)))
        texts: list[list[int]] = [[] for _ in prompts]
        began, before, written = 0.0, self.engine.stats(), 0
        while self.engine.busy:
            for output in self.engine.step():
                texts[order[output.id]] += output.tokens
            if not began and all(texts):
                began, before, written = time.perf_counter(), self.engine.stats(), sum(map(len, texts))
        after = self.engine.stats()
        rose = {name: after[name] - before[name] for name in after if "/" in name or name == "steps"}
        tokens = sum(map(len, texts)) - written
        return {"texts": texts, "tokens_per_s": tokens / (time.perf_counter() - began), **rose}


def measure(
    engines: dict[str, Served], prompts: list[tuple[int, ...]], rounds: int, new: int
) -> list[dict[str, Any]]:
    """Every engine at every number of sequences and temperature."""
    rows = []
    for temperature in TEMPERATURES:
        for sequences in SEQUENCES:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for number in range(rounds + 1):
                start = number * sequences % (len(prompts) - sequences + 1)
                load, texts = prompts[start : start + sequences], None
                for name in list(engines)[:: 1 if number % 2 else -1]:
                    found = engines[name].run(load, temperature, new)
                    texts = texts or found["texts"]
                    if found.pop("texts") != texts:
                        raise SystemExit(f"guesses of {name} changed what was written")
                    if number:  # the first round warms up, and lets the engine learn what pays
                        runs[name].append(found)
            for name, found in runs.items():
                median = {key: statistics.median(run[key] for run in found) for key in found[0]}
                rows.append(
                    {"guesses": name, "temperature": temperature, "sequences": sequences, **median}
                )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, default=demo_text("held_out"), help="where prompts come from")
    parser.add_argument("--draft", nargs="*", default=["self:skip"], help="as `serve --draft`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument("--name", default="serve_guess", help="name of the result file; empty writes none")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy or arguments.quick)
    console, rounds, new = Console(), arguments.rounds, NEW
    if arguments.quick:
        rounds, new = 1, 12
    engines = {"none": Served(arguments.model, None, False), "text": Served(arguments.model, None, True)}
    engines |= {f"text, {draft}": Served(arguments.model, draft, True) for draft in arguments.draft}
    prompts = prompts_of(arguments.model, arguments.text, 4 * max(SEQUENCES))
    rows = measure(engines, prompts, rounds, new)
    plain = {
        (row["temperature"], row["sequences"]): row["tokens_per_s"]
        for row in rows
        if row["guesses"] == "none"
    }
    table = Table("temperature", "sequences", "guesses", "tokens/s", "beside none", "right / checked")
    for row in rows:
        ratio = row["tokens_per_s"] / plain[row["temperature"], row["sequences"]]
        row["ratio"] = ratio
        counts = [
            f"{name.partition('/')[2]} {row[name.replace('drafted', 'accepted')]:.0f} / {row[name]:.0f}"
            for name in row
            if name.startswith("drafted_tokens/") and row[name]
        ]
        table.add_row(
            str(row["temperature"]), str(row["sequences"]), row["guesses"], f"{row['tokens_per_s']:.0f}",
            f"{ratio:.2f}", ", ".join(counts),
        )  # fmt: skip
    console.print(table)
    if arguments.name and not arguments.quick:
        facts = {"model": arguments.model, "prompt_tokens": PROMPT, "new_tokens": new, "rounds": rounds}
        write_result(arguments.name, {"others_cores": busy, **facts, "rows": rows})


if __name__ == "__main__":
    main()
