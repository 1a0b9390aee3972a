"""HIGGS against rounding to nearest and GPTQ: error of every linear and the KL of all together.

For each language model at hand the linears of all blocks are rounded: by HIGGS behind rotations, to levels of
values one by one and to points of several together, alone and with error feedback; to the same grids without
a rotation, to NF4, and to integers, by rounding to nearest and by second-order rounding with the source's
inputs. Errors are relative output errors on held-out text, their geometric mean over the linears; KL is that
of all linears rounded at once, embedding and head left alone. HIGGS without feedback and rounding to nearest
see no text.

    python benchmarks/higgs.py [--assets DIR] [--only MODEL ...]
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
from tailorbird.formats.codebooks import VECTOR_UNITS
from tailorbird.formats.packed import CodebookCoding, Coding, IntegerCoding, PackedWeight, VectorCoding
from tailorbird.linear import LINEAR_METHODS

#: calibration windows, which GPTQ reads; the rest as in `sensitivity`
SEQUENCES = 24
TEST_TOKENS = 4096
BITS = (2, 3, 4)
GROUP = 64


def cases(bits: int) -> list[tuple[str, dict[str, Any], Coding]]:
    """Method, its settings and coding."""
    normal, integers = CodebookCoding(f"gauss{bits}", GROUP), IntegerCoding(bits, GROUP)
    vectors = [name for name in VECTOR_UNITS if name.startswith(f"gauss{bits}x")]
    found: list[tuple[str, dict[str, Any], Coding]] = [
        ("higgs", {}, normal),
        ("higgs", {}, CodebookCoding(f"gauss{bits}", 256)),
        *(("higgs", {}, VectorCoding(name, group)) for name in vectors for group in (GROUP, 256)),
        ("higgs", {"feedback": True}, normal),
        *(("higgs", {"feedback": True}, VectorCoding(name, GROUP)) for name in vectors),
        ("rtn", {}, normal),
        *(("rtn", {}, VectorCoding(name, GROUP)) for name in vectors),
        ("rtn", {}, integers),
        ("rtn", {}, IntegerCoding(bits, GROUP, symmetric=True)),
        ("gptq", {"asymmetric": False}, integers),
    ]
    return found + ([("rtn", {}, CodebookCoding("nf4", GROUP))] if bits == 4 else [])


@torch.no_grad()
def run(subject: Subject) -> list[dict[str, Any]]:
    """All numbers of one model."""
    every = AllAtOnce(subject, SEQUENCES, TEST_TOKENS)
    rows = []
    for bits in BITS:
        for method, settings, coding in cases(bits):
            made = LINEAR_METHODS[method](**settings)
            rounds = functools.partial(made, coding=coding) if made.needs else _unseen(made, coding)
            stated = {"method": method, "settings": settings, "coding": coding.label}
            rows.append({"model": subject.name, "bits": bits} | stated | every.row(rounds))
            print(rows[-1], flush=True)
    return rows


def _unseen(method: Any, coding: Coding) -> Any:
    """The method without any text."""

    def rounds(weight: torch.Tensor, _: Any) -> PackedWeight:
        packed: PackedWeight = method(weight, None, coding)
        return packed

    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--name", default="higgs", help="name of the result file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for subject in subjects(arguments.assets):
        if arguments.only and subject.name not in arguments.only:
            continue
        rows += run(subject)
        write_result(arguments.name, {"rows": rows})
    table = Table("model", "method", "coding", "bits per weight", "error", "KL")
    for row in rows:
        table.add_row(
            row["model"], row["method"], row["coding"], f"{row['bits_per_weight']:.3f}",
            f"{row['error']:.4g}", f"{row['kl']:.4g}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
