"""Does what a format holds of Gaussian values tell what a model loses in it? Ranks of errors and of KL.

All linears of a language model are rounded at once to each format of `tailorbird formats` that both can make:
rounding to nearest, and error feedback (`gptq`, for tables `leanquant`). Then the KL from the source is set
beside the format's Gaussian error. Embedding and head are left alone.

    python benchmarks/format_capacity.py [--assets DIR] [--only MODEL ...]
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from all_at_once import AllAtOnce
from fit_quality import ASSETS, Subject, subjects
from machine import write_result
from tailorbird.formats.packed import Coding, TableCoding
from tailorbird.linear import LINEAR_METHODS
from tailorbird.plan.capacity import FORMATS, gaussian_error

#: as in `tables`
SEQUENCES, TEST_TOKENS = 24, 2048


def method_of(feedback: bool, coding: Coding) -> Any:
    """Rounds to a format, to nearest or with error feedback."""
    if not feedback:
        return LINEAR_METHODS["rtn"]()
    name = "leanquant" if isinstance(coding, TableCoding) else "gptq"
    return LINEAR_METHODS[name](asymmetric=False)


@torch.no_grad()
def run(subject: Subject) -> dict[str, Any]:
    """KL of every format both ways, and how alike the ranks are (Spearman), over all and within a width."""
    every = AllAtOnce(subject, SEQUENCES, TEST_TOKENS)
    rows = []
    for coding in FORMATS:
        if not all(coding.kind in method_of(feedback, coding).makes for feedback in (False, True)):
            continue
        row: dict[str, Any] = {
            "format": coding.label,
            "bits": coding.bits,
            "gaussian": gaussian_error(coding),
        }
        for name in ("nearest", "feedback"):
            found = every.row(functools.partial(method_of(name == "feedback", coding), coding=coding))
            row |= {name: found["kl"], "bits_per_weight": found["bits_per_weight"]}
        rows.append(row)
        print(row, flush=True)
    ranks = {name: alike(rows, name) for name in ("nearest", "feedback")}
    four = [row for row in rows if row["bits"] in (2, 3, 4)]
    widths = {bits: [row for row in four if row["bits"] == bits] for bits in (2, 3, 4)}
    within = {name: {bits: alike(some, name) for bits, some in widths.items()} for name in ranks}
    return {"model": subject.name, "rows": rows, "spearman": ranks, "spearman_of_width": within}


def alike(rows: list[dict[str, Any]], name: str) -> float:
    """Spearman's correlation of Gaussian errors and KL."""
    pairs = torch.tensor([[row["gaussian"], row[name]] for row in rows], dtype=torch.float64).T
    return float(torch.corrcoef(pairs.argsort(1).argsort(1).double())[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", nargs="+", help="names of models")
    arguments = parser.parse_args()
    wanted = [one for one in subjects(arguments.assets) if not arguments.only or one.name in arguments.only]
    models = [run(subject) for subject in wanted]
    write_result("format_capacity", {"models": models})
    table = Table("model", "format", "bits per weight", "Gaussian error", "KL to nearest", "KL with feedback")
    for model in models:
        for row in model["rows"]:
            table.add_row(
                model["model"], row["format"], f"{row['bits_per_weight']:.3f}", f"{row['gaussian']:.3g}",
                f"{row['nearest']:.3g}", f"{row['feedback']:.3g}",
            )  # fmt: skip
        print(model["model"], model["spearman"], model["spearman_of_width"])
    Console().print(table)


if __name__ == "__main__":
    main()
