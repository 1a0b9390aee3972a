"""The grids of normal values in `formats/codebooks.py`: the best points, and the bytes nearest to them.

Lloyd's iteration moves each point to the mean of what is nearest to it until nothing moves. Levels are whole
numbers up to 127: of all units that a standard deviation may have, the one is taken with which the rounded
points lose least, and of equals the smallest.

    python benchmarks/gaussian_grids.py
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rich.console import Console
from rich.table import Table

from tailorbird.formats.codebooks import LARGEST

BITS = (2, 3, 4)
NORMAL = NormalDist()
#: how finely units are tried, in levels at the outermost point
FINENESS = 0.05


@dataclass(frozen=True)
class Cell:
    """What of a standard normal value is nearest to a point: its share, sum and sum of squares."""

    share: float
    first: float
    second: float


def cells(points: Sequence[float]) -> list[Cell]:
    """The cells of ascending points, between the halves of the way from each to the next."""
    halves = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(points)), math.inf]
    below = [NORMAL.cdf(x) if math.isfinite(x) else float(x > 0) for x in halves]
    density = [NORMAL.pdf(x) if math.isfinite(x) else 0.0 for x in halves]
    moment = [x * d if math.isfinite(x) else 0.0 for x, d in zip(halves, density, strict=True)]
    return [
        Cell(
            share := below[i + 1] - below[i],
            density[i] - density[i + 1],
            share + moment[i] - moment[i + 1],
        )
        for i in range(len(points))
    ]


def distortion(points: Sequence[float]) -> float:
    """Mean squared error of a standard normal value at the nearest point."""
    found = zip(points, cells(points), strict=True)
    return sum(cell.second - 2 * x * cell.first + x * x * cell.share for x, cell in found)


def lloyd(count: int) -> list[float]:
    """The points that are best for a standard normal value, ascending."""
    points = [NORMAL.inv_cdf((i + 0.5) / count) for i in range(count)]
    while True:
        moved = [cell.first / cell.share for cell in cells(points)]
        if max(abs(a - b) for a, b in zip(points, moved, strict=True)) < 1e-13:
            return moved
        points = moved


def levels_of(points: Sequence[float]) -> tuple[list[int], float]:
    """Whole numbers up to 127 in proportion to the points, and the unit that they are best read in."""
    found = []
    for step in range(math.ceil(len(points) / FINENESS), int(LARGEST / FINENESS) + 1):
        levels = [round(x * step * FINENESS / points[-1]) for x in points]
        unit = sum(x * x for x in levels) / sum(x * y for x, y in zip(levels, points, strict=True))
        found.append((round(distortion([x / unit for x in levels]), 12), levels[-1], levels, unit))
    *_, levels, unit = min(found)
    return levels, unit


def main() -> None:
    table = Table("bits", "levels above zero", "unit", "error", "of the best points")
    for bits in BITS:
        points = lloyd(1 << bits)
        levels, unit = levels_of(points)
        table.add_row(
            str(bits), ", ".join(map(str, levels[len(levels) // 2 :])), f"{unit:.5f}",
            f"{distortion([x / unit for x in levels]):.6f}", f"{distortion(points):.6f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
