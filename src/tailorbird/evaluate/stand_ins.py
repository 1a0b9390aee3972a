"""Blocks of random weights that stand in for a model's where only time matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailorbird.formats.packed import (
    BinaryCoding,
    Coding,
    EntropyCoding,
    FloatCoding,
    TableCoding,
    VectorCoding,
)
from tailorbird.kernels import native
from tailorbird.kernels.blocks import (
    ACTIVATIONS,
    NORM_KINDS,
    PAGE,
    STEPS,
    BlockStructure,
    HeadsStructure,
    LinearStructure,
    NormStructure,
    run_blocks,
)
from tailorbird.kernels.packing import packed_width
from tailorbird.kernels.reference import group_layout

#: Repetitions of a measurement, and of one with few tokens, which is the more easily disturbed.
REPEATS, MORE_REPEATS, FEW_TOKENS = 5, 15, 16


@dataclass(frozen=True)
class Kernel:
    """How a linear is multiplied in compiled blocks.

    Attributes
    ----------
    coding : Coding
        Of the stored weight; a dense weight in float16 is widened to float32.
    int8 : bool
        Whether inputs are rounded to bytes.
    """

    coding: Coding
    int8: bool = False

    @property
    def name(self) -> str:
        """Such as ``int4 g64 · int8`` or ``bf16``."""
        if isinstance(self.coding, FloatCoding):
            return "fp32" if self.coding.dtype == "float16" else self.coding.label
        return f"{self.coding.label} · {'int8' if self.int8 else 'float'}"


@dataclass(frozen=True)
class Width:
    """Channels of a stand-in block: between blocks, inside the feed-forward sublayer, and heads of 64."""

    width: int
    inner: int
    heads: int
    kv_heads: int

    @property
    def shapes(self) -> dict[str, list[tuple[int, int]]]:
        """``(out_features, in_features)`` of the linears of each step."""
        attended, keys = 64 * self.heads, 64 * self.kv_heads
        return {
            "attention_in": [(rows, self.width) for rows in (attended, keys, keys)],
            "attention_out": [(self.width, attended)],
            "mlp_in": [(self.inner, self.width)] * 2,
            "mlp_out": [(self.width, self.inner)],
        }

    @property
    def label(self) -> str:
        return f"{self.width} x {self.inner} x {self.heads} x {self.kv_heads}"

    @property
    def weights(self) -> int:
        return sum(rows * columns for shapes in self.shapes.values() for rows, columns in shapes)


NOTHING = Width(64, 64, 1, 1)
CACHED = Width(512, 1408, 8, 4)
STREAMED = Width(1024, 2816, 16, 8)


class Weights:
    """Random weights of one kernel in memory that the linears share out among themselves."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        self.kernel, self.arena, self.kept = kernel, native.Arena(), []  # type: ignore[var-annotated]
        self.left = size

    def linear(self, rows: int, columns: int) -> LinearStructure:
        """A linear with weights of its own."""
        coding = self.kernel.coding
        if isinstance(coding, FloatCoding):
            dtype = torch.bfloat16 if coding.dtype == "bfloat16" else torch.float32
            dense = self._keep(torch.full((rows, columns), 1e-3, dtype=dtype, device="cpu"))
            described = native.WeightStructure(rows=rows, in_features=columns, columns=columns, groups=1)
            self.left -= dense.nbytes
            return LinearStructure(described, dense.data_ptr(), None, int(dtype == torch.float32), 0)
        if isinstance(coding, EntropyCoding | BinaryCoding):
            raise ValueError(f"`{coding.label}` doesn't run in compiled blocks")
        if isinstance(coding, TableCoding):
            return self._of_tables(coding, rows, columns)
        groups, size = group_layout(columns, coding.group_size)
        tiles, steps = -(-rows // native.LANES), -(-columns // native.STEP)
        vectors = isinstance(coding, VectorCoding)  # whose coordinates are bytes in memory
        bits = coding.bits if coding.levels is None else 8 if vectors else native.CODEBOOK_BITS
        codes = self._keep(self.arena.empty(tiles, steps, bits, native.LANES))
        codes.fill_(0x2B5D1E73)
        scales = self._keep(
            torch.full((tiles, groups, native.LANES), 1e-3, dtype=torch.bfloat16, device="cpu")
        )
        zeros = table = None
        if coding.levels is not None and not vectors:
            table = self._keep(torch.arange(16, dtype=torch.uint8, device="cpu"))
        elif not coding.symmetric:
            zeros = self._keep(torch.ones((tiles, groups, native.LANES), dtype=torch.uint8, device="cpu"))
        described = native.WeightStructure(
            codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), rows, columns,
            steps * native.STEP, groups, steps * native.STEP if groups == 1 else size,
            bits if table is None else 8, 0, None if table is None else table.data_ptr(),
        )  # fmt: skip
        self.left -= codes.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)
        return LinearStructure(described, None, None, 0, int(self.kernel.int8))

    def _of_tables(self, coding: TableCoding, rows: int, columns: int) -> LinearStructure:
        codes = torch.full((rows, packed_width(columns, coding.bits)), 0x5D, dtype=torch.uint8, device="cpu")
        tables = torch.ones(rows, 1 << coding.bits, dtype=torch.bfloat16, device="cpu")
        layout = native.table_rows(
            codes, None, None, bits=coding.bits, group_size=0, in_features=columns, tables=tables,
            arena=self.arena,
        )  # fmt: skip
        self.kept += [layout.codes, layout.tables]
        self.left -= codes.nbytes + tables.nbytes
        return LinearStructure(layout.described, None, None, 0, 0)

    def block(self, of: Width) -> BlockStructure:
        """A gated block with rotary angles."""
        ones = self._keep(torch.ones(of.width, dtype=torch.float32, device="cpu"))
        norm = NormStructure(ones.data_ptr(), None, 1e-5, NORM_KINDS["root_mean_square"])
        none = NormStructure(None, None, 0.0, NORM_KINDS["none"])
        q, k = 64 * of.heads, 64 * of.kv_heads
        block = BlockStructure(
            before_attention=norm, before_mlp=norm, after_attention=none, after_mlp=none, query=none,
            key=none, queries=HeadsStructure(0, q // of.kv_heads, 64), keys=HeadsStructure(q, 64, 64),
            values=HeadsStructure(q + k, 64, 64), heads=of.heads, kv_heads=of.kv_heads, head_dim=64,
            rotary_dim=64, attention_linears=3, mlp_linears=2, gated=1, activation=ACTIVATIONS["silu"],
            scale=0.125,
        )  # fmt: skip
        for step, shapes in of.shapes.items():
            linears = [self.linear(*shape) for shape in shapes]
            if len(shapes) == 1:
                setattr(block, step, linears[0])
            else:
                for index, linear in enumerate(linears):
                    getattr(block, step)[index] = linear
        return block

    def blocks(self, of: Width, most: int) -> Any:
        """At most so many blocks: as many as the memory holds, one at least."""
        made = [self.block(of)]
        while len(made) < most and self.left > 0:
            made.append(self.block(of))
        return (BlockStructure * len(made))(*made)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        return tensor


class StandIn:
    """Blocks on which tokens are timed."""

    def __init__(self, kernel: Kernel, of: Width, most: int = 1, size: int = 1) -> None:
        self.of, self.weights = of, Weights(kernel, size)
        self.blocks = self.weights.blocks(of, most)

    def steps(self, tokens: int, sequences: int = 1, context: int = 0, most: int | None = None) -> Tensor:
        """Median seconds ``[len(STEPS)]`` of a block; tokens are shared out evenly among the sequences."""
        of, each = self.of, tokens // sequences
        pages = -(-(context + each) // PAGE)
        width = 64 * of.kv_heads * PAGE
        apart = len(self.blocks) if context else 1  # the keys of each block, as a model has them
        shape = 2, apart, sequences * pages * width
        cache = torch.zeros(shape, dtype=torch.bfloat16, device="cpu")
        angles = torch.ones(context + each, 64, dtype=torch.float32, device="cpu")
        for index, block in enumerate(self.blocks):
            block.key_pages, block.value_pages = (part[index % apart].data_ptr() for part in cache)
            block.cosine = block.sine = angles.data_ptr()
        hidden = torch.ones(tokens, of.width, dtype=torch.float32, device="cpu")
        positions = torch.arange(context, context + each, dtype=torch.int32, device="cpu").repeat(sequences)
        of_sequence = torch.arange(sequences, dtype=torch.int32, device="cpu").repeat_interleave(each)
        table = torch.arange(sequences * pages, dtype=torch.int32, device="cpu").view(sequences, pages)
        count = len(self.blocks) if most is None else min(most, len(self.blocks))
        rounds = []
        for number in range((MORE_REPEATS if tokens <= FEW_TOKENS else REPEATS) + 1):
            seconds = torch.zeros(len(STEPS), dtype=torch.float64, device="cpu")
            run_blocks(
                self.blocks, hidden, positions, of_sequence, table, torch.bfloat16, last=count,
                seconds=seconds,
            )  # fmt: skip
            if number:  # the first one warms up
                rounds.append(seconds / count)
        return torch.stack(rounds).median(0).values
