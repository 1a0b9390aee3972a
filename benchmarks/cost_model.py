"""The cost model: predicted against measured speed, over models, codings and batches.

Random-weight Llamas of three sizes, every linear in one coding (and once with inputs left as they are),
decode a while after a prompt at several batches. The speed of a shared machine changes within minutes by more
than what is looked for: kernels are timed, the batches are measured right afterwards, and both are done again
a few times, with the batches in another order each time. A cell counts with the median of its ratios of
predicted to measured speed. The goal is within 15 % for reading the prompt and for decoding. What a format
of a model came to is kept when it is done; a run that was stopped goes on behind it.

    python benchmarks/cost_model.py [--models 50M 110M 0.5B] [--batches 1 8 64] [--sweeps 5] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from machine import add_quiet_option, kept_result, require_quiet, write_result
from packed_models import round_plainly
from random_models import write_random_llama
from tailorbird.evaluate.speed import Speed, speed
from tailorbird.hardware.cache import forget_kernel_times
from tailorbird.kernels import native

#: name -> (blocks, width, feed-forward width, heads, key heads); vocabulary of 32,000
SIZES = {
    "50M": (8, 512, 1536, 8, 4),
    "110M": (12, 768, 2048, 12, 4),
    "0.5B": (24, 1024, 4096, 16, 8),
}
#: name -> bits, group, whether inputs are rounded to bytes
FORMATS = {
    "3 bits": (3, 64, True),
    "4 bits": (4, 64, True),
    "8 bits": (8, 128, True),
    "4 bits, exact inputs": (4, 64, False),
}
PROMPT, NEW = 128, 32
#: Steps of up to FEW sequences are short, and what else the machine does tells: they are measured MORE often.
FEW, MORE = 8, 3
ALLOWED = 0.15


def measure(
    size: str, formats: list[str], batches: list[int], sweeps: int, rounds: int, console: Console
) -> Iterator[list[dict[str, Any]]]:
    """Of one size, the rows of each format at every batch."""
    blocks, hidden, intermediate, heads, kv_heads = SIZES[size]
    with tempfile.TemporaryDirectory(prefix="cost-model-") as folder:
        source = write_random_llama(
            Path(folder) / "source", blocks=blocks, hidden=hidden, intermediate=intermediate, heads=heads,
            kv_heads=kv_heads, context=1024,
        )  # fmt: skip
        for name in formats:
            bits, group, int8 = FORMATS[name]
            path = round_plainly(source, Path(folder) / name.replace(" ", "-"), bits, group, int8)
            found: dict[int, list[Speed]] = {batch: [] for batch in batches}
            for sweep in range(sweeps):
                forget_kernel_times()  # timed anew with the first of the batches
                for place in range(len(batches)):
                    batch = batches[(sweep + place) % len(batches)]
                    often = rounds * MORE if batch <= FEW else rounds
                    found[batch].append(
                        speed(path, prompt_tokens=PROMPT, new_tokens=NEW, batch=batch, rounds=often)
                    )
            rows = [
                {"model": size, "format": name, "batch": batch} | compared(found[batch]) for batch in batches
            ]
            for row in rows:
                console.print(
                    f"{size}, {name}, batch {row['batch']}: prefill {row['prefill_off']:+.1%}, "
                    f"decode {row['decode_off']:+.1%}"
                )
            yield rows


def compared(sweeps: list[Speed]) -> dict[str, Any]:
    """Predicted and measured tokens per second of every sweep, and the median of how far they are apart."""
    fields: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        key = f"{phase}_tokens_per_s"
        measured = [getattr(found, key) for found in sweeps]
        predicted = [found.predicted[key] for found in sweeps if found.predicted is not None]
        offs = [after / before - 1 for before, after in zip(measured, predicted, strict=True)]
        fields |= {
            f"{phase}_measured": measured,
            f"{phase}_predicted": predicted,
            f"{phase}_off": statistics.median(offs),
        }
    return fields | {"kernels": sweeps[-1].kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument(
        "--sweeps", type=int, default=5, help="how often kernels are timed, and models measured"
    )
    parser.add_argument(
        "--rounds", type=int, default=3,
        help=f"measurements of a batch in each sweep, {MORE} times as many up to {FEW} sequences",
    )  # fmt: skip
    parser.add_argument("--name", default="cost_model", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    console = Console()
    settings = {
        "batches": arguments.batches, "sweeps": arguments.sweeps, "rounds": arguments.rounds,
        "prompt": PROMPT, "new": NEW, "library": native.fingerprint(),
    }  # fmt: skip
    rows = kept_result(arguments.name, settings).get("rows", [])
    with tempfile.TemporaryDirectory(prefix="cost-model-") as cache:
        os.environ["TAILORBIRD_CACHE"] = cache  # what is known of this machine stays known
        for size in arguments.models:
            done = {row["format"] for row in rows if row["model"] == size}
            missing = [name for name in FORMATS if name not in done]
            for found in measure(
                size, missing, arguments.batches, arguments.sweeps, arguments.rounds, console
            ):
                rows += found
                write_result(
                    arguments.name,
                    {"others_cores": busy, "settings": settings, "summary": summary(rows), "rows": rows},
                )
    table = Table(
        "model",
        "format",
        "batch",
        "prefill: predicted",
        "measured",
        "off",
        "decode",
        "measured",
        "off",
        caption="medians of the sweeps: tokens per second, and how far predicted and measured ones are apart",
    )
    for row in rows:
        cells = []
        for phase in ("prefill", "decode"):
            off = row[f"{phase}_off"]
            cells += [
                f"{statistics.median(row[f'{phase}_predicted']):.0f}",
                f"{statistics.median(row[f'{phase}_measured']):.0f}",
                f"{off:+.1%}" + ("" if abs(off) <= ALLOWED else " !"),
            ]  # fmt: skip
        table.add_row(row["model"], row["format"], str(row["batch"]), *cells)
    console.print(table)
    console.print(summary(rows))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far predicted and measured speeds are apart, of prompts and of decoding."""
    offs = {phase: [abs(row[f"{phase}_off"]) for row in rows] for phase in ("prefill", "decode")}
    return {
        phase: {
            "within_15_percent": sum(off <= ALLOWED for off in found),
            "of": len(found),
            "median": statistics.median(found),
            "worst": max(found),
        }
        for phase, found in offs.items()
    }


if __name__ == "__main__":
    main()
