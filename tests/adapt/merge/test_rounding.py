"""A packed weight moves towards its target: never worse than rounding to nearest, and with its coding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressed import pack
from tailorbird.adapt.merge.rounding import FITTED, KEPT, NEAREST, Rounding
from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    CodesCoding,
    DoubleCoding,
    IntegerCoding,
    TableCoding,
    VectorCoding,
)
from tailorbird.linear.error import row_energies
from tailorbird.linear.quantize.higgs import Higgs
from tailorbird.linear.quantize.rtn import Rtn

CODINGS: list[CodesCoding] = [
    *(IntegerCoding(bits, 32) for bits in (2, 3, 4, 5, 6, 8)),
    IntegerCoding(4, 32, symmetric=True),
    IntegerCoding(3, 0, scale_dtype="float16"),
    CodebookCoding("nf4", 32),
    CodebookCoding("gauss3", 32),
    VectorCoding("gauss2x4", 32),
    VectorCoding("gauss4x2", 32),
    TableCoding(3),
    TableCoding(4, "float16"),
    BinaryCoding(32),
]
ROWS, COLUMNS = 24, 72


def statistics(decay: float = 0.0) -> LinearStatistics:
    """Of correlated inputs, whose principal components fall off as so high a power, as those of models do."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    mixing *= torch.arange(1, COLUMNS + 1)[:, None] ** -decay
    x = torch.randn(400, COLUMNS, generator=generator) @ mixing
    return LinearStatistics(x.T @ x / len(x), None, x.abs().mean(0), len(x))


def weight(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.1


def change(size: float, seed: int = 2) -> Tensor:
    """Of rank 2, its values about `size` times those of the weight."""
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(ROWS, 2, generator=generator), torch.randn(2, COLUMNS, generator=generator)
    return up @ down * (0.1 * size / 2**0.5)


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "reordered"])
@pytest.mark.parametrize("size", [0.02, 0.5])
@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_no_row_is_worse_than_rounded_to_nearest(coding: CodesCoding, size: float, ordered: bool) -> None:
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3)) if ordered else None
    stored, known = pack(weight(), coding, order), statistics()
    target = stored.dequantize() + change(size)
    rounded = Rounding(known)(stored, target)
    assert (rounded.packed.coding, sum(rounded.rows.values())) == (coding, ROWS)
    assert set(rounded.rows) == {KEPT, FITTED, NEAREST}
    natural = torch.arange(COLUMNS) if order is None else order
    gram = known.gram[natural][:, natural]
    inputs = replace(known, gram=gram)
    nearest = Rtn()(target[:, natural], inputs, coding).dequantize()
    ours = rounded.packed.dequantize()[:, natural]
    energies = [row_energies(target[:, natural] - one, gram) for one in (ours, nearest)]
    assert bool((energies[0] <= energies[1] * (1 + 1e-5) + 1e-12).all())
    if order is not None:
        assert torch.equal(rounded.packed.tensors["order"], stored.tensors["order"])


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "reordered"])
@pytest.mark.parametrize("size", [0.02, 0.5])
def test_scales_that_are_codes_stay_and_codes_are_as_on_their_grid(size: float, ordered: bool) -> None:
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3)) if ordered else None
    stored, known = pack(weight(), DoubleCoding("nf4", 32), order), statistics()
    target = stored.dequantize() + change(size)
    rounded = Rounding(known)(stored, target)
    assert rounded.rows == {KEPT: ROWS}
    assert rounded.packed.tensors.keys() == stored.tensors.keys()
    for name in ("scales", "scale_sizes", "scale_mean"):
        assert torch.equal(rounded.packed.tensors[name], stored.tensors[name])
    errors = [row_energies(target - one.dequantize(), known.gram).sum() for one in (rounded.packed, stored)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "reordered"])
@pytest.mark.parametrize("coding", [*CODINGS, DoubleCoding("nf4", 32)], ids=lambda coding: coding.label)
def test_no_change_keeps_every_byte(coding: CodesCoding, ordered: bool) -> None:
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3)) if ordered else None
    stored = pack(weight(), coding, order)
    rounded = Rounding(statistics())(stored, stored.dequantize())
    assert rounded.rows[KEPT] == ROWS
    for part, tensor in stored.tensors.items():
        assert torch.equal(rounded.packed.tensors[part], tensor), part


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", ["gauss2", "gauss3", "gauss4", "gauss2x4", "gauss3x2"])
def test_codes_behind_a_transform_move_there(name: str, rank: int) -> None:
    known, method = statistics(), Higgs()
    coding = VectorCoding(name, 32) if "x" in name else CodebookCoding(name, 32)
    stored = method(weight(), None, coding)
    if rank:
        generator = torch.Generator().manual_seed(5)
        up, down = (
            torch.randn(ROWS, rank, generator=generator),
            torch.randn(rank, COLUMNS, generator=generator),
        )
        stored = stored.with_low_rank(0.1 * up, 0.1 * down)
    same = Rounding(known)(stored, stored.dequantize()).packed
    assert all(torch.equal(same.tensors[part], tensor) for part, tensor in stored.tensors.items())
    target = stored.dequantize() + change(0.5)
    moved = Rounding(known)(stored, target).packed
    assert (moved.coding, moved.transform) == (coding, stored.transform)
    assert torch.equal(moved.tensors["signs"], stored.tensors["signs"])
    anew = method(target - stored.beside(), None, coding).dequantize() + stored.beside()
    energies = [
        float(row_energies(target - one, known.gram).sum())
        for one in (moved.dequantize(), anew, stored.dequantize())
    ]
    assert energies[0] < energies[1] < energies[2]


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_a_low_rank_part_stays_and_the_codes_move(coding: CodesCoding) -> None:
    generator, known = torch.Generator().manual_seed(5), statistics()
    up, down = torch.randn(ROWS, 3, generator=generator), torch.randn(3, COLUMNS, generator=generator)
    stored = pack(weight(), coding).with_low_rank(0.1 * up, 0.1 * down)
    for delta in (torch.zeros(ROWS, COLUMNS), change(0.5)):
        target = stored.dequantize() + delta
        rounded = Rounding(known)(stored, target).packed
        for part in ("up", "down"):
            assert torch.equal(rounded.tensors[part], stored.tensors[part])
        changed = any(not torch.equal(rounded.tensors[part], stored.tensors[part]) for part in stored.tensors)
        assert changed == bool(delta.any())
        left, before = (
            float(row_energies(target - one.dequantize(), known.gram).sum()) for one in (rounded, stored)
        )
        assert left < before or not delta.any()


@pytest.mark.parametrize("bits", [3, 4])
def test_a_change_below_half_a_step_survives_that_rounding_to_nearest_would_erase(bits: int) -> None:
    coding = IntegerCoding(bits, 32)
    stored, known = pack(weight(), coding), statistics(decay=1.0)
    delta = change(1.0).sign() * (0.4 * float(stored.tensors["scales"].float().min()))
    target = stored.dequantize() + delta
    size, left, nearest = (
        float(row_energies(target - one, known.gram).sum())
        for one in (
            stored.dequantize(),  # what rounding to nearest on the grid that it has gives
            Rounding(known)(stored, target).packed.dequantize(),
            Rtn()(target, known, coding).dequantize(),
        )
    )
    assert left < size / 3
    assert nearest > size


@pytest.mark.parametrize(
    "coding",
    [one for one in CODINGS if not isinstance(one, TableCoding | BinaryCoding)],
    ids=lambda coding: coding.label,
)
def test_scales_of_zero_that_others_stored_divide_nothing(coding: CodesCoding) -> None:
    stored = pack(weight(), coding)
    stored.tensors["scales"][:4] = 0
    target = stored.dequantize()
    target[8:] += change(0.5)[8:]
    moved = Rounding(statistics())(stored, target).packed
    assert moved.dequantize().isfinite().all()
    assert moved.dequantize()[:4].abs().max() < 1e-6
