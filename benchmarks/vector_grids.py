"""The grids of points in `formats/grids`: those nearest to vectors of standard normal values, as bytes.

Lloyd's iteration moves each point to the mean of what is nearest to it. In the plane the density is added up
over a lattice; in four dimensions a fixed Sobol sequence stands for it. Where the iteration ends depends on
where it begins: of several starts on few nodes the best is carried on with many. Starts are drawn from the
density in which the best points lie, that of the values to the power `d / (d + 2)`, which is normal, too
(Gersho 1979, "Asymptotically Optimal Block Quantization").

    python benchmarks/vector_grids.py [--only NAME ...] [--write]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize_scalar
from torch import Tensor

from tailorbird.formats.codebooks import GRIDS, LARGEST

#: name -> points, values of each
SHAPES = {"gauss2x2": (16, 2), "gauss3x2": (64, 2), "gauss4x2": (256, 2), "gauss2x4": (256, 4)}
STARTS = 12
#: iterations at most: of a start, and of the best one on many nodes
STEPS = (250, 400)
#: in standard deviations, at which the iteration ends
STILL = 1e-4
#: of a lattice from the origin, and nodes on a side of it
EXTENT, SIDES = 5.2, (160, 520)
#: binary logarithms of lengths of a sequence
LENGTHS = (15, 19)
CHUNK = 1 << 14


@dataclass(frozen=True, eq=False)
class Cloud:
    """Vectors ``[nodes, dimension]`` and weights ``[nodes]`` of sum one that stand for normal values."""

    nodes: Tensor
    weights: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of both."""
        yield from zip(self.nodes.split(CHUNK), self.weights.split(CHUNK), strict=True)


def cloud(dimension: int, fine: bool) -> Cloud:
    """A lattice in the plane, a Sobol sequence elsewhere; many nodes where `fine`."""
    if dimension == 2:
        axis = (torch.arange(SIDES[fine]) + 0.5) * (2 * EXTENT / SIDES[fine]) - EXTENT
        nodes = torch.cartesian_prod(axis, axis)
        weights = torch.exp(-nodes.square().sum(1) / 2)
        kept = weights > 1e-7
        return Cloud(nodes[kept], weights[kept] / weights[kept].sum())
    uniform = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=0).draw(1 << LENGTHS[fine])
    nodes = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-1 + 1e-6, 1 - 1e-6))
    return Cloud(nodes, torch.full((len(nodes),), 1 / len(nodes)))


def nearest(values: Tensor, points: Tensor) -> Tensor:
    """Indices of the nearest points: of the greatest ``2 x p - |p|^2``."""
    return torch.addmm(-points.square().sum(1), values, points.t(), alpha=2).argmax(1)


def means(points: Tensor, of: Cloud) -> tuple[Tensor, float]:
    """The mean of what is nearest to each point, and the mean squared error of a value at the points."""
    share = torch.zeros(len(points), dtype=torch.float64)
    sums = torch.zeros(points.shape, dtype=torch.float64)
    lost = 0.0
    for nodes, weights in of.chunks():
        cell = nearest(nodes, points)
        share.index_add_(0, cell, weights.double())
        sums.index_add_(0, cell, (nodes * weights[:, None]).double())
        lost += float(((nodes - points[cell]).square().sum(1) * weights).sum())
    kept = torch.where(share[:, None] > 0, sums / share.clamp(min=1e-30)[:, None], points.double())
    return kept.float(), lost / points.shape[1]


def lloyd(points: Tensor, of: Cloud, steps: int) -> tuple[Tensor, float]:
    """Points that are the means of their cells, or nearly so, and their mean squared error."""
    for _ in range(steps):
        moved, _ = means(points, of)
        still, points = float((moved - points).abs().max()) < STILL, moved
        if still:
            break
    return points, means(points, of)[1]


def best_points(count: int, dimension: int) -> Tensor:
    """The best of `STARTS` ends of the iteration, float32 ``[count, dimension]``, in ascending order."""
    few, many = cloud(dimension, False), cloud(dimension, True)
    generator = torch.Generator().manual_seed(0)
    width = math.sqrt((dimension + 2) / dimension)
    starts = [width * torch.randn((count, dimension), generator=generator) for _ in range(STARTS)]
    points, _ = min((lloyd(start, few, STEPS[0]) for start in starts), key=lambda found: found[1])
    points, _ = lloyd(points, many, STEPS[1])
    return points[torch.tensor(sorted(range(count), key=lambda i: points[i].tolist()))]


def levels_of(points: Tensor) -> Tensor:
    """Points as whole numbers, the largest at 127: int8."""
    return (points * (LARGEST / points.abs().max())).round().to(torch.int8)


def unit_of(levels: Tensor) -> tuple[float, float]:
    """The unit in which levels lose least, in levels per standard deviation, and their error then."""
    of, largest = cloud(levels.shape[1], True), float(levels.abs().max())

    def error(unit: float) -> float:
        return means(levels.float() / unit, of)[1]

    found = minimize_scalar(error, bounds=(largest / 5, largest), method="bounded", options={"xatol": 1e-3})
    return float(found.x), float(found.fun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--write", action="store_true", help="write the files that the package reads")
    arguments = parser.parse_args()
    table = Table("grid", "unit", "error", "of the best points")
    for name in arguments.only:
        points = best_points(*SHAPES[name])
        levels = levels_of(points)
        unit, error = unit_of(levels)
        best = means(points, cloud(points.shape[1], True))[1]
        table.add_row(name, f"{unit:.5f}", f"{error:.6f}", f"{best:.6f}")
        if arguments.write:
            lines = (" ".join(map(str, row)) for row in levels.tolist())
            (GRIDS / f"{name}.txt").write_text("\n".join(lines) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
