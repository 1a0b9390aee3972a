"""NF4 against integers of 4 bits: the error of every linear and the KL of all together, at their true bytes.

For each language model at hand the linears of all blocks are rounded, to nearest and by second-order
rounding with the source's inputs, to integers with and without zero points and to the levels of NF4. Errors
are relative output errors on held-out text, their geometric mean over the linears; KL is that of all linears
rounded at once, embedding and head left alone. Since zero points take bytes, the error of integers with them
is also carried over to the bytes of NF4, on the line through two of their group sizes. The last table says
what levels of one byte cost beside the quantiles themselves, with the largest weight of a group at the end.

    python benchmarks/codebook.py [--assets DIR] [--only MODEL ...]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from all_at_once import AllAtOnce
from fit_quality import ASSETS, Subject, subjects
from machine import write_result
from sensitivity import SEQUENCES
from tailorbird.formats import codebooks
from tailorbird.formats.packed import CodebookCoding, GroupedCoding, IntegerCoding
from tailorbird.linear import LINEAR_METHODS

GROUPS = (32, 64, 128)
CODINGS: tuple[GroupedCoding, ...] = (
    *(IntegerCoding(4, group) for group in GROUPS),
    *(IntegerCoding(4, group, symmetric=True) for group in GROUPS),
    *(CodebookCoding("nf4", group) for group in GROUPS),
)
METHODS = {"rtn": LINEAR_METHODS["rtn"](), "gptq": LINEAR_METHODS["gptq"](asymmetric=False)}
TEST_TOKENS = 16_384


@torch.no_grad()
def run(subject: Subject) -> dict[str, Any]:
    """All numbers of one model."""
    every = AllAtOnce(subject, SEQUENCES, TEST_TOKENS)
    rows = [
        {"model": subject.name, "method": method, "coding": coding.label}
        | every.row(functools.partial(rounds, coding=coding))
        for method, rounds in METHODS.items()
        for coding in CODINGS
    ]
    quantiles = torch.tensor(codebooks.normal_quantiles())
    levels = codebooks.LEVELS["nf4"].float() / codebooks.LARGEST
    exact, stored = (
        every.error(lambda name, weight, values=values: by_largest(weight, values))
        for values in (quantiles, levels)
    )
    return {"rows": rows, "of_bytes": {"model": subject.name, "quantiles": exact, "bytes": stored}}


def by_largest(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """`weight` in groups of 64, each over its largest magnitude and then rounded to the nearest level."""
    found = torch.empty_like(weight)
    for group, into in zip(weight.split(64, dim=1), found.split(64, dim=1), strict=True):
        scale = group.abs().amax(1, keepdim=True).clamp(min=1e-30)
        codes = torch.bucketize((group / scale).contiguous(), (levels[1:] + levels[:-1]) / 2)
        into.copy_(levels[codes] * scale)
    return found


def at_bytes_of(rows: list[dict[str, Any]], nf4: dict[str, Any], field: str) -> float:
    """What integers with zero points would have at the bytes of `nf4`, which lie between two of theirs."""
    rivals = sorted(
        (r for r in rows if r["coding"].startswith("int4") and not r["coding"].endswith("sym")),
        key=lambda r: r["bits_per_weight"],
    )
    pairs = list(itertools.pairwise(rivals))
    bits = nf4["bits_per_weight"]
    low, high = next((pair for pair in pairs if pair[1]["bits_per_weight"] >= bits), pairs[-1])
    share = (bits - low["bits_per_weight"]) / (high["bits_per_weight"] - low["bits_per_weight"])
    return math.exp((1 - share) * math.log(low[field]) + share * math.log(high[field]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--name", default="codebook", help="name of the result file")
    arguments = parser.parse_args()
    console = Console()
    rows, of_bytes = [], []
    for subject in subjects(arguments.assets):
        if arguments.only and subject.name not in arguments.only:
            continue
        found = run(subject)
        of_bytes.append(found["of_bytes"])
        for row in found["rows"]:
            if row["coding"].startswith("nf4"):
                fellows = [r for r in found["rows"] if r["method"] == row["method"]]
                group = row["coding"].split()[1]
                plain = next(r for r in fellows if r["coding"] == f"int4 {group} sym")
                for field in ("error", "kl"):
                    row[f"{field}_over_symmetric"] = row[field] / plain[field]
                    row[f"{field}_over_zero_points"] = row[field] / at_bytes_of(fellows, row, field)
            rows.append(row)
        write_result(arguments.name, {"rows": rows, "levels_of_bytes": of_bytes})
    table = Table("model", "method", "coding", "bits per weight", "error", "KL")
    for row in rows:
        table.add_row(
            row["model"], row["method"], row["coding"], f"{row['bits_per_weight']:.3f}",
            f"{row['error']:.4g}", f"{row['kl']:.4g}",
        )  # fmt: skip
    console.print(table)
    table = Table("model", "method", "coding", "error / symmetric", "KL", "error / with zero points", "KL")
    for row in (r for r in rows if "kl_over_symmetric" in r):
        table.add_row(
            row["model"], row["method"], row["coding"], f"{row['error_over_symmetric']:.3f}",
            f"{row['kl_over_symmetric']:.3f}", f"{row['error_over_zero_points']:.3f}",
            f"{row['kl_over_zero_points']:.3f}",
        )  # fmt: skip
    console.print(table)
    table = Table("model", "error with the quantiles", "with bytes")
    for found in of_bytes:
        table.add_row(found["model"], f"{found['quantiles']:.5g}", f"{found['bytes']:.5g}")
    console.print(table)


if __name__ == "__main__":
    main()
