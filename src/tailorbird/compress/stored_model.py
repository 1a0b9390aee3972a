"""A compressed checkpoint as an export reads it: verified, one packed weight at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import ExportError
from tailorbird.formats.packed import (
    FLOAT_DTYPES,
    PARTS,
    Coding,
    FloatCoding,
    LowRank,
    PackedWeight,
    name_part,
)
from tailorbird.formats.sparse import Sparse
from tailorbird.formats.transform import Transform
from tailorbird.model.anatomy import Anatomy, layout_of, read_anatomy
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint
from tailorbird.model.layout import ModelLayout
from tailorbird.model.outline import build_outline


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of the model.

    Attributes
    ----------
    name : str
        Module path.
    out_features, in_features : int
        Rows and columns as in `nn.Linear`; of an embedding: rows and width.
    coding : Coding
    order : bool
        Its columns are stored in another order than that of the inputs.
    low_rank : LowRank or None
    sparse : Sparse or None
        What stands beside its codes.
    transform : Transform or None
        What inputs go through before them.
    kind : str
        ``linear``, ``conv1d`` (GPT-2, whose dense weight is transposed), ``embedding`` or ``head``.
    """

    name: str
    out_features: int
    in_features: int
    coding: Coding
    order: bool
    low_rank: LowRank | None
    sparse: Sparse | None
    transform: Transform | None
    kind: str

    @property
    def named_part(self) -> str | None:
        """What there is besides codes, in words."""
        return name_part(self.low_rank, self.sparse, self.transform)

    @property
    def label(self) -> str:
        """Name and coding, for messages."""
        return f"`{self.name}` ({self.coding.label})"


@dataclass
class StoredModel:
    """What lies in a compressed checkpoint.

    Attributes
    ----------
    checkpoint : Checkpoint
    anatomy : Anatomy
    layout : ModelLayout
    matrices : list of Matrix
        Embedding, linears in forward order, and the head where it isn't tied.
    others : list of str
        Tensors that are no part of a matrix: norms, biases, positions.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    layout: ModelLayout
    matrices: list[Matrix]
    others: list[str]

    @classmethod
    def open(cls, directory: Path) -> StoredModel:
        """Open a checkpoint that tailorbird made and compare every tensor with its recorded hash.

        Raises
        ------
        ExportError
            The model isn't compressed, or its shapes aren't those of config.json.
        UserError
            As `open_checkpoint`, `read_anatomy` and `Weights.verify`.
        """
        checkpoint = open_checkpoint(str(directory))
        layout = layout_of(checkpoint)
        if layout is None:
            raise ExportError(
                f"{directory} is not compressed",
                "a model that `tailorbird fit` or `compress` made",
                "use it as it is, or compress it first",
            )
        dense = build_outline(checkpoint.config).model
        _refuse_changed_shapes(dense, layout)
        checkpoint.weights.verify()
        anatomy = read_anatomy(checkpoint)
        matrices = _matrices(checkpoint, anatomy, layout, dense)
        parts = {f"{m.name}.{part}" for m in matrices for part in ("weight", *PARTS)}
        others = [
            name for name in checkpoint.weights.names if name not in parts and name not in anatomy.ignored
        ]
        return cls(checkpoint, anatomy, layout, matrices, others)

    @property
    def float_dtype(self) -> torch.dtype:
        """The 16-bit dtype of the model's own float values; bfloat16 where it has wider ones."""
        dtype = self.checkpoint.config.dtype
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16

    def packed(self, matrix: Matrix) -> PackedWeight:
        """Read one matrix in its stored form; floats as `[out_features, in_features]` too."""
        read = self.checkpoint.weights.read
        if isinstance(matrix.coding, FloatCoding):
            weight = read(f"{matrix.name}.weight")
            tensors = {"weight": weight.T.contiguous() if matrix.kind == "conv1d" else weight}
        else:
            stored = self.layout.modules[matrix.name].tensor_names(matrix.name)
            tensors = {name.rpartition(".")[2]: read(name) for name in stored}
        return PackedWeight(matrix.coding, matrix.out_features, matrix.in_features, tensors)

    def dense(self, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """Read one matrix and dequantize it; oriented as the dense model stores it."""
        weight = self.packed(matrix).dequantize(dtype)
        return weight.T.contiguous() if matrix.kind == "conv1d" else weight


def _refuse_changed_shapes(dense: Any, layout: ModelLayout) -> None:
    """Other tools build all blocks from the one set of numbers in config.json."""
    for index in layout.blocks:
        raise ExportError(
            f"block {index} has heads or sublayers of its own",
            "blocks that are all as config.json says",
            "only tailorbird loads such a model",
        )
    for name, module in layout.modules.items():
        try:
            weight = dense.get_submodule(name).weight
        except AttributeError:
            continue  # named as in a decoder without head; read_anatomy finds or refuses it
        if sorted(weight.shape) != sorted((module.out_features, module.in_features)):
            raise ExportError(
                f"`{name}` is [{module.out_features}, {module.in_features}], not {list(weight.shape)}",
                "the shapes that config.json gives",
                "only tailorbird loads such a model",
            )


def _matrices(checkpoint: Checkpoint, anatomy: Anatomy, layout: ModelLayout, dense: Any) -> list[Matrix]:
    from transformers.pytorch_utils import Conv1D

    shapes: list[tuple[str, int, int, str]] = [
        (anatomy.embedding, anatomy.vocab_size, anatomy.embedding_width, "embedding")
    ]
    for place in anatomy.linears():
        kind = "conv1d" if isinstance(dense.get_submodule(place.name), Conv1D) else "linear"
        shapes.append((place.name, place.out_features, place.in_features, kind))
    if not anatomy.tied:
        shapes.append((anatomy.head, anatomy.vocab_size, anatomy.embedding_width, "head"))
    matrices = []
    names = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
    for name, rows, columns, kind in shapes:
        stated = layout.modules.get(name)
        if stated is not None and not isinstance(stated.coding, FloatCoding):
            parts = stated.low_rank, stated.sparse, stated.transform
            matrices.append(Matrix(name, rows, columns, stated.coding, stated.order, *parts, kind))
            continue
        stored = checkpoint.weights.info(f"{name}.weight").dtype
        if stored not in names:
            raise ExportError(
                f"`{name}` is stored as {stored}",
                "16 or 32 bits, or packed integers",
                "compress the model anew",
            )
        matrices.append(
            Matrix(name, rows, columns, FloatCoding(names[stored]), False, None, None, None, kind)
        )
    return matrices
