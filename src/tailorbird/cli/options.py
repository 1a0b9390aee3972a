"""Options that several commands share, written once so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorbird.errors import SettingsError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A local directory, a Hugging Face id, or `demo`, the model in the package."
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        "--bits",
        metavar="8|6|4|2",
        help="Read linears stored in 8 bits, as by the recipe double-rounding, at so many bits.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to write; must not exist yet.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE|DIR",
        help="Text to learn from: txt, jsonl with `text` or `messages`, parquet. "
        "Without it, the model writes some.",
    ),
]
Evaluation = Annotated[
    str | None,
    typer.Option(
        "--evaluation",
        metavar="FILE|DIR",
        help="Held-out text for the comparison. Without it, a tenth of the calibration text is set aside.",
    ),
]
Sequences = Annotated[
    int | None, typer.Option("--sequences", metavar="N", min=1, help="How many calibration sequences to use.")
]
Length = Annotated[
    int | None, typer.Option("--length", metavar="N", min=2, help="Tokens of each calibration sequence.")
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        min=0.0,
        help="Refuse the result above this mean KL divergence from the source, nats/token.",
    ),
]
MaxPerplexityIncrease = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-increase",
        metavar="PERCENT",
        help="Refuse the result when perplexity grows by more than this, in percent.",
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        metavar="auto|exact",
        help="auto lets linears round their inputs to bytes, for speed, where that costs little; "
        "exact lets none.",
    ),
]
AllowSlower = Annotated[
    bool,
    typer.Option(
        "--allow-slower",
        help="Accept a result that decoded slower than its source in every round timed here; "
        "else it is refused.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME=DIR", help="An adapter that is asked for by NAME; may be repeated."
    ),
]
AdapterBits = Annotated[
    int | None,
    typer.Option(
        "--adapter-bits",
        metavar="8",
        help="8 rounds adapters' matrices to bytes, for memory; else they stay as they are stored.",
    ),
]
ServingMemory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="For weights, keys, values and adapters together, such as 4GiB or 60%.",
    ),
]
SwapMemory = Annotated[
    str | None,
    typer.Option(
        "--swap-memory", metavar="SIZE", help="RAM for copies of keys and values that had to make room."
    ),
]
SwapDisk = Annotated[
    str | None,
    typer.Option(
        "--swap-disk",
        metavar="SIZE",
        help="The same on disk, in a file without a name in TMPDIR or /var/tmp.",
    ),
]
MaxSequences = Annotated[
    int, typer.Option("--max-sequences", metavar="N", min=1, help="Sequences that run at a time.")
]
ServingContext = Annotated[
    int | None,
    typer.Option(
        "--context", metavar="N", min=2, help="Most tokens of prompt and answer; else the model's limit."
    ),
]
DraftFrom = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="DIR|self:skip",
        help="What guesses tokens, which changes the speed and nothing else: a smaller model with the same "
        "vocabulary, heads from `tailorbird draft`, or the model itself with blocks left out.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads; all cores if not given.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=1, help="Most time for one answer.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Insist on resuming: nothing to resume is an error. "
        "Without it, unfinished work is resumed if there is any.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON value on standard output, and nothing else there."),
]
#: The largest seed that plans can hold.
MOST_SEED = 1 << 62
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, max=MOST_SEED, help="Seed of everything random.")
]
IdleSeed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        max=MOST_SEED,
        help="Taken by every command; nothing in this one is random.",
    ),
]


def check_text(text: str) -> str:
    """`text`, which has to be one that can be encoded.

    Raises
    ------
    SettingsError
        The command line held bytes that aren't UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingsError(
            f"a text with bytes that aren't UTF-8, at character {error.start + 1}",
            "text in UTF-8",
            "write it in UTF-8, or leave those bytes out",
        ) from None
    return text


def check_device(device: str) -> str:
    """`device`, which can only be the processor so far.

    Raises
    ------
    SettingsError
        It is something else.
    """
    if device != "cpu":
        raise SettingsError(
            f"--device {device}", "cpu, the only device that the commands use so far", "use --device cpu"
        )
    return device


Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", callback=check_device, help="Where to compute; only cpu so far."
    ),
]
