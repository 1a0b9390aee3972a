"""Tables and outliers against grids: errors of every linear and the KL of all together, at their true bytes.

For each language model at hand the linears of all blocks are rounded with the source's inputs, to integers
in groups and in whole rows, to tables of a row's own values, and to integers beside outliers in 16 bits.
Errors are relative output errors on held-out text, their geometric mean over the linears; KL is that of all
linears rounded at once, embedding and head left alone. Rows of other models and bits that a file of results
has already stay.

    python benchmarks/tables.py [--assets DIR] [--only MODEL ...] [--bits N ...]
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from all_at_once import AllAtOnce
from fit_quality import ASSETS, Subject, subjects
from machine import RESULTS, write_result
from tailorbird.formats.packed import BinaryCoding, Coding, IntegerCoding, TableCoding
from tailorbird.linear import LINEAR_METHODS

#: calibration windows; the rest as in `sensitivity`
SEQUENCES = 24
TEST_TOKENS = 2048


def cases(bits: int) -> list[tuple[str, dict[str, Any], Coding]]:
    """Method, its settings and coding."""
    exact = {"asymmetric": False}
    grids: list[Coding] = [IntegerCoding(bits, group) for group in (32, 64, 128, 0)]
    found = [("gptq", exact, coding) for coding in grids]
    tables = TableCoding(bits)
    found += [("rtn", {}, tables), ("leanquant", exact, tables)]
    found += [
        ("leanquant", {**exact, "exponent": 3.0}, tables),
        ("ganq", exact, tables),
        ("bcq", exact, tables),
    ]
    if bits == BinaryCoding.bits:
        signs = [BinaryCoding(group) for group in (64, 128, 256)]
        found += [("rtn", {}, signs[0])]
        found += [
            ("billm", {**exact, "static_groups": static}, coding)
            for static in (False, True)
            for coding in signs
        ]
    outliers = [("spqr", 0.005), ("spqr", 0.01), ("quantease", 0.0), ("quantease", 0.01)]
    found += [(name, {**exact, "outliers": share}, IntegerCoding(bits, 64)) for name, share in outliers]
    return found


@torch.no_grad()
def run(subject: Subject, widths: list[int]) -> list[dict[str, Any]]:
    """All numbers of one model."""
    every = AllAtOnce(subject, SEQUENCES, TEST_TOKENS)
    rows = []
    for bits in widths:
        for method, settings, coding in cases(bits):
            stated = {"method": method, "settings": settings, "coding": coding.label}
            rounds = functools.partial(LINEAR_METHODS[method](**settings), coding=coding)
            rows.append({"model": subject.name, "bits": bits} | stated | every.row(rounds))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--name", default="tables", help="name of the result file")
    arguments = parser.parse_args()
    file = RESULTS / f"{arguments.name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for subject in subjects(arguments.assets):
        if arguments.only and subject.name not in arguments.only:
            continue
        found = run(subject, arguments.bits)
        rows = [r for r in rows if r["model"] != subject.name or r["bits"] not in arguments.bits] + found
        write_result(arguments.name, {"rows": rows})
    table = Table("model", "method", "settings", "coding", "bits per weight", "error", "KL")
    for row in rows:
        table.add_row(
            row["model"], row["method"], str(row["settings"]), row["coding"],
            f"{row['bits_per_weight']:.3f}", f"{row['error']:.4g}", f"{row['kl']:.4g}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
