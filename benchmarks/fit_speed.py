"""Speed: tokens per second of a compressed model against its bf16 self, and how long compressing takes.

Random-weight Llamas are compressed by round-to-nearest (embedding and head too), then source and result read
and write tokens in turns in one process; medians over rounds. The bar: a 4-bit model of at least 100 M
parameters decodes at batch 1 at 1.5 times the speed of its bf16 self. Refuses to start on a busy machine.

    python benchmarks/fit_speed.py [--sizes 14M 50M 110M] [--bits 2 3 4 8] [--batches 1 8] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tailorbird
from machine import add_quiet_option, require_quiet, write_result
from random_models import write_random_llama
from tailorbird.errors import GateRefused
from tailorbird.evaluate.speed import compare_speed
from tailorbird.model.checkpoint import open_checkpoint

#: name -> (blocks, width, feed-forward width, heads, vocabulary)
SIZES = {
    "14M": (6, 384, 1024, 6, 4_096),
    "50M": (10, 512, 1536, 8, 16_384),
    "110M": (12, 768, 2048, 12, 32_000),
    "0.5B": (24, 1024, 2816, 16, 32_000),
}
BAR_PARAMETERS = 100_000_000
BAR_RATIO = 1.5
CONTEXT = 1024


def write_text(path: Path) -> Path:
    """Documents of random letters: random weights have nothing to say about better ones."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(200):
            file.write(json.dumps({"text": "".join(rng.choices("abcdefghij klmnop\n", k=600))}) + "\n")
    return path


def compress(model: Path, output: Path, bits: int, text: Path) -> tuple[Path, float]:
    """Where the result lies, and the seconds that making it took, reading and checking included."""
    recipe = f"rtn:bits={bits},group=64,embedding_bits={bits}"
    try:
        result = tailorbird.compress(
            str(model), output, recipe=recipe, calibration=str(text), sequences=4, length=128,
            measure_speed=False,
        )  # fmt: skip
    except GateRefused as refusal:
        # The divergence of a model that knows nothing isn't what is measured here.
        result = refusal.result
    return Path(result.output), result.seconds


def measure(size: str, arguments: argparse.Namespace, folder: Path, console: Console) -> list[dict[str, Any]]:
    """All bit widths and batches of one model."""
    blocks, hidden, intermediate, heads, vocabulary = SIZES[size]
    model = write_random_llama(
        folder / size, blocks=blocks, hidden=hidden, intermediate=intermediate, heads=heads,
        kv_heads=heads, vocabulary=vocabulary, context=CONTEXT,
    )  # fmt: skip
    source = open_checkpoint(str(model))
    text = write_text(folder / "text.jsonl")
    rows = []
    for bits in arguments.bits:
        result, seconds = compress(model, folder / f"{size}-{bits}", bits, text)
        for batch in arguments.batches:
            speeds = compare_speed(
                model, result, arguments.prompt_tokens, arguments.new_tokens, batch, rounds=arguments.rounds
            )
            rows.append(
                {
                    "size": size,
                    "parameters": source.parameters,
                    "bits": bits,
                    "batch": batch,
                    "source_bytes": source.weights.total_bytes,
                    "result_bytes": open_checkpoint(str(result)).weights.total_bytes,
                    "compress_seconds": seconds,
                    **asdict(speeds),
                }
            )
            console.print(f"{size} {bits} bits, batch {batch}: {speeds.ratio:.2f}x")
    return rows


def bar(rows: list[dict[str, Any]]) -> bool | None:
    """Whether every 4-bit model of the bar's size reaches it at batch 1; None where none was measured."""
    ratios = [
        row["ratio"]
        for row in rows
        if row["bits"] == 4 and row["batch"] == 1 and row["parameters"] >= BAR_PARAMETERS
    ]
    return min(ratios) >= BAR_RATIO if ratios else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["14M", "50M", "110M"], choices=list(SIZES))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8], choices=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="fit_speed", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    console = Console()
    others = require_quiet(arguments.even_if_busy)
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="fit-speed-") as folder:
            rows += measure(size, arguments, Path(folder), console)
    table = Table("model", "bits", "batch", "MB", "made in s", "bf16 tok/s", "tok/s", "ratio", "path")
    for row in rows:
        table.add_row(
            row["size"], str(row["bits"]), str(row["batch"]), f"{row['result_bytes'] / 1e6:.0f}",
            f"{row['compress_seconds']:.1f}", f"{row['source_decode_tokens_per_s']:.1f}",
            f"{row['result_decode_tokens_per_s']:.1f}", f"{row['ratio']:.2f}x",
            ", ".join(sorted({path.split(" · ")[-1] for path in row["paths"]})),
        )  # fmt: skip
    console.print(table)
    reached = bar(rows)
    if reached is not None:
        console.print(
            f"4 bits, 100 M parameters or more, batch 1, {BAR_RATIO}x: {'yes' if reached else 'NO'}"
        )
    path = write_result(
        arguments.name,
        {
            "others_cores": others,
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            "bar_reached": reached,
            "rows": rows,
        },
    )
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
