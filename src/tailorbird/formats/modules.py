"""Modules that hold packed weights and run them: a linear, and an embedding.

To the rest of PyTorch they are an `nn.Linear` and an `nn.Embedding` whose `weight` can be read, being
dequantized on each access, but not written. Nothing here knows of models or files.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.packed import (
    ENTROPY_PARTS,
    PARTS,
    SCALE_PARTS,
    EntropyCoding,
    FloatCoding,
    LowRank,
    PackedCoding,
    PackedWeight,
    ScaledCoding,
    check_order,
    expanded_scales,
    tensor_layout,
    unpacking,
    with_parts,
)
from tailorbird.formats.sparse import (
    SPARSE_PARTS,
    Sparse,
    check_sparse,
    part_of_rows,
    stated_sparse,
    whole_columns,
)
from tailorbird.formats.transform import (
    TRANSFORM_PARTS,
    Transform,
    check_transform,
    stated_transform,
    transformed,
    weight_in_front,
)
from tailorbird.kernels import additions, dispatch, entropy, native, reference

#: what `torch.autocast` casts before a linear
_CAST = (torch.float32, torch.bfloat16, torch.float16)
#: path of a linear that is decoded anew at each call
DECODED = "decoded"
_IN_PLACE = {"__setitem__"} | {
    f"__i{operator}__"
    for operator in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    ]
}


def _refuse_write() -> NoReturn:
    raise SettingsError(
        "a write to the weight of a compressed module",
        "reads only: the weight is dequantized from packed codes on each access",
        "dequantize the model first, or train an adapter beside it",
    )


class DequantizedWeight(Tensor):
    """What `weight` of a compressed module returns: a tensor that refuses to be changed in place.

    A change would be lost, since the next access dequantizes again. Results of computing with it are
    plain tensors.
    """

    #: transformers asks before it initializes what a checkpoint didn't have; here there is nothing to do
    _is_hf_initialized = True

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = (
            name in _IN_PLACE
            or (name.endswith("_") and not name.startswith("__") and name != "requires_grad_")
            or func == Tensor.data.__set__  # type: ignore[attr-defined]
        )
        # functions of torch.nn.init pass the tensor by name
        changed = (*args[:1], *([] if args else kwargs.values())) if writes else ()
        out = kwargs.get("out")
        changed += tuple(out) if isinstance(out, tuple | list) else (out,)
        if any(isinstance(tensor, cls) for tensor in changed):
            _refuse_write()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class _PackedModule(nn.Module):
    """What linear and embedding have in common: the stored tensors, and a weight to be read only.

    Stored tensors are buffers whose dtype never changes: `.to(dtype)` and its like move them, and change
    only `compute_dtype`.
    """

    coding: PackedCoding
    compute_dtype: torch.dtype
    codes: Tensor
    scales: Tensor | None
    scale_sizes: Tensor | None
    scale_mean: Tensor | None
    tables: Tensor | None
    zeros: Tensor | None
    order: Tensor | None
    signs: Tensor | None
    left: Tensor | None
    right: Tensor | None
    up: Tensor | None
    down: Tensor | None
    counts: Tensor | None
    columns: Tensor | None
    values: Tensor | None
    lengths: Tensor | None
    sizes: Tensor | None
    stream: Tensor | None
    rest: Tensor | None

    def _create(
        self,
        rows: int,
        columns: int,
        coding: PackedCoding,
        has_order: bool,
        device: Any,
        low_rank: LowRank | None = None,
        sparse: Sparse | None = None,
        transform: Transform | None = None,
    ) -> None:
        if isinstance(coding, FloatCoding):
            raise SettingsError(
                f"a compressed module of coding `{coding.label}`",
                "integers, a codebook, points, tables or entropy-coded values",
                "keep weights of a float coding in an ordinary module",
            )
        self.coding = coding
        self.compute_dtype = torch.float32
        layout = tensor_layout(coding, rows, columns, has_order, low_rank, sparse, transform)
        for name in PARTS:
            if name in layout:
                shape, dtype = layout[name]
                # zeros, not empty memory: an order of random numbers would not even be readable
                self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
            else:
                self.register_buffer(name, None)

    def _shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight."""
        raise NotImplementedError

    def _stored(self) -> dict[str, Tensor]:
        return {name: tensor for name in PARTS if (tensor := getattr(self, name)) is not None}

    def _scales(self) -> Tensor | None:
        """Scales of groups as what reads codes takes them."""
        return expanded_scales({name: getattr(self, name) for name in ("scales", *SCALE_PARTS)})

    @property
    def has_parts_beside(self) -> bool:
        """Whether a low-rank or a sparse part stands beside the base."""
        return self.up is not None or self.values is not None

    @property
    def transform(self) -> Transform | None:
        """What inputs go through before the base."""
        return stated_transform(self._stored())

    def packed(self) -> PackedWeight:
        """The weight in its stored form; shares memory with this module.

        Raises
        ------
        CheckpointError
            When the tensors don't fit the coding, or the stored order is no permutation.
        """
        return PackedWeight(self.coding, *self._shape(), self._stored())

    def _decoded(self, rows: slice | None = None) -> Tensor:
        """An entropy-coded weight, or some of its rows, in bfloat16; zeros where nothing was read yet."""
        assert self.rest is not None
        if not any(self.rest.stride()):  # one value for all: a placeholder, until a file is read
            return self.rest[slice(None) if rows is None else rows].bfloat16()
        return entropy.decode({name: getattr(self, name) for name in ENTROPY_PARTS}, rows)

    @property
    def _device(self) -> torch.device:
        stored = self.rest if isinstance(self.coding, EntropyCoding) else self.codes
        assert stored is not None
        return stored.device

    def _read_weight(self) -> Tensor:
        if isinstance(self.coding, EntropyCoding):
            return self._decoded().to(self.compute_dtype).as_subclass(DequantizedWeight)
        more = self.has_parts_beside or self.transform is not None
        weight = reference.dequantize(
            self.codes,
            self._scales(),
            self.zeros,
            in_features=self._shape()[1],
            dtype=torch.float32 if more else self.compute_dtype,
            order=self.order,
            tables=self.tables,
            **unpacking(self.coding),
        )
        weight = weight_in_front(weight, self._stored())
        if self.has_parts_beside:
            weight = with_parts(weight, self._stored())
        return weight.to(self.compute_dtype).as_subclass(DequantizedWeight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            _refuse_write()
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            _refuse_write()
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            _refuse_write()
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name == "weight":
            _refuse_write()
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _PackedModule:
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self._device)).dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list,
        unexpected_keys: list,
        error_msgs: list,
    ) -> None:
        for name, own in self._buffers.items():
            given = state_dict.get(prefix + name)
            if own is None or given is None:
                continue
            if given.dtype != own.dtype:
                error_msgs.append(f"`{prefix}{name}` is {given.dtype}, but {own.dtype} for this coding")
            elif name == "order":
                try:
                    check_order(given)
                except CheckpointError as error:
                    error_msgs.append(f"`{prefix}{name}`: {error}")
            elif name in TRANSFORM_PARTS:
                try:
                    check_transform({name: given})
                except CheckpointError as error:
                    error_msgs.append(f"`{prefix}{name}`: {error}")
        sparse = {name: state_dict[prefix + name] for name in SPARSE_PARTS if prefix + name in state_dict}
        stored = self._stored()
        # of other shapes they are refused below
        if sparse and all(name in stored and one.shape == stored[name].shape for name, one in sparse.items()):
            try:
                check_sparse({**stored, **sparse}, self._shape()[1])
            except CheckpointError as error:
                error_msgs.append(f"the sparse part of `{prefix}`: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class CompressedLinear(_PackedModule, nn.Linear):
    """`nn.Linear` over a packed weight.

    Runs through the fastest path that there is for its coding and the dtype and number of rows of the
    activations, else through the exact reference; `path` names it. A fast path's layout of the weight is
    made at the first call that needs it, lives beside the stored tensors, is never saved and is dropped
    when those move or change. Where the input requires a gradient only some paths can run; the stored
    tensors get none. As in any linear, `torch.autocast` decides the dtype.

    Parameters
    ----------
    in_features, out_features : int
    coding : IntegerCoding, CodebookCoding, VectorCoding, DoubleCoding, TableCoding or EntropyCoding
    bias : bool
    has_order : bool
        Whether columns are stored in another order than that of the inputs.
    device : torch.device or str, optional
        `meta` is possible.
    bias_dtype : torch.dtype
    rounds : bool
        Whether inputs may be rounded to bytes, which is faster where a path does so. Those of the low-rank
        and the sparse part never are, and inputs that only the sparse part multiplies widen no others' steps.
    low_rank : LowRank, optional
    sparse : Sparse, optional
        What stands beside the base.
    simulated : {"fp8", "int4", "int8-static"}, optional
        What the base's inputs are always rounded to (`reference.round_inputs`), in a product of float32.
        Gradients pass the rounding as if it weren't there.
    transform : Transform, optional
        What inputs go through before the base; then there is no order.
    input_scale : float, optional
        With ``int8-static``, and only then: the one scale of its inputs (`reference.round_to_scale`).

    Attributes
    ----------
    compute_dtype : torch.dtype
        Of `weight`; the output has the dtype of the input. float32 unless set, or changed by `.to(dtype)`.
    """

    _embedding: CompressedEmbedding | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        coding: PackedCoding,
        bias: bool,
        has_order: bool = False,
        device: torch.device | str | None = None,
        bias_dtype: torch.dtype = torch.float32,
        rounds: bool = False,
        low_rank: LowRank | None = None,
        sparse: Sparse | None = None,
        simulated: str | None = None,
        transform: Transform | None = None,
        input_scale: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if (simulated == reference.INT8_STATIC) != (input_scale is not None):
            raise ValueError(f"inputs rounded to {simulated} with the scale {input_scale}")
        self.rounds = rounds
        self.simulated = simulated
        self.input_scale = input_scale
        # whose stored tensors these are where tied; not a child, which would be saved a second time
        self.__dict__["_embedding"] = None
        self.in_features = in_features
        self.out_features = out_features
        self._create(out_features, in_features, coding, has_order, device, low_rank, sparse, transform)
        self.bias: nn.Parameter | None  # type: ignore[assignment]
        if bias:
            zeros = torch.zeros(out_features, dtype=bias_dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self._fast: _FastWeight | None = None  # of the path that ran last
        self._native: _FastWeight | None = None  # of compiled blocks
        # as the compiled additions read them
        self._factors: additions.LowRankFactors | None = None
        self._rows: additions.StoredRows | None = None
        self._apart: _InputsApart | None = None

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: Tensor | None = None,
        rounds: bool = False,
        simulated: str | None = None,
        input_scale: float | None = None,
    ) -> CompressedLinear:
        """A linear that holds the tensors of `packed`, without copying, and `bias` `[out_features]`."""
        if isinstance(packed.coding, FloatCoding):
            raise SettingsError(
                f"a packed weight of coding `{packed.coding.label}`",
                "integers, a codebook, points, tables or entropy-coded values",
                "put the weight into an ordinary nn.Linear",
            )
        module = cls(
            packed.in_features,
            packed.out_features,
            packed.coding,
            bias is not None,
            "order" in packed.tensors,
            device="meta",
            rounds=rounds,
            low_rank=packed.low_rank,
            sparse=packed.sparse,
            simulated=simulated,
            transform=packed.transform,
            input_scale=input_scale,
        )
        for name, tensor in packed.tensors.items():
            setattr(module, name, tensor)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight `[out_features, in_features]` in `compute_dtype`; changing it raises."""
        return self._read_weight()

    def weight_rows(self, rows: slice) -> Tensor:
        """Some rows of the weight, ``[rows, in_features]`` float32, without the others being dequantized."""
        if isinstance(self.coding, EntropyCoding):
            return self._decoded(rows).float()
        scales = self._scales()
        base = reference.dequantize(
            self.codes[rows],
            None if scales is None else scales[rows],
            None if self.zeros is None else self.zeros[rows],
            in_features=self.in_features,
            order=self.order,
            tables=None if self.tables is None else self.tables[rows],
            **unpacking(self.coding),
        )
        base = weight_in_front(base, self._stored())
        parts: dict[str, Tensor] = {}
        if self.up is not None and self.down is not None:
            parts = {"up": self.up[rows], "down": self.down}
        if self.values is not None:
            parts |= part_of_rows(self._stored(), rows)
        return with_parts(base, parts)

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank part beside the base."""
        return self.packed().low_rank

    @property
    def sparse(self) -> Sparse | None:
        """The sparse part beside the base."""
        return stated_sparse(self._stored())

    def check_parts(self, name: str) -> None:
        """Raise `CheckpointError`, with the `name` of this linear, unless its parts can be read.

        They are its transform and its sparse part.
        """
        try:
            check_transform(self._stored())
            if self.values is not None:
                check_sparse(self._stored(), self.in_features)
        except CheckpointError as error:
            raise CheckpointError(f"`{name}`: {error.given}", error.expected, error.remedy) from None

    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def __getattr__(self, name: str) -> Any:
        if name in PARTS:
            embedding = self._embedding
            if embedding is not None:
                return getattr(embedding, name)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_fast": None,
            "_native": None,
            "_factors": None,
            "_rows": None,
            "_apart": None,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _PackedModule:
        self._fast = self._native = self._factors = self._rows = self._apart = None
        return super()._apply(fn, recurse)

    def path(self, rows: int, dtype: torch.dtype, gradient: bool = False) -> str:
        """Name of the path that `rows` rows of activations of `dtype` take here.

        With `gradient` the activations require one.
        """
        if isinstance(self.coding, EntropyCoding):
            return DECODED
        device = self.codes.device
        if self.simulated is None:
            base = dispatch.choose(self.coding, self.in_features, rows, dtype, device, self.rounds, gradient)
        else:
            wide = torch.float32
            base = dispatch.choose(self.coding, self.in_features, rows, wide, device, gradient=gradient)
            base = f"{base}, inputs in {self.simulated} simulated"
        return base if self.transform is None else f"{self.transform.word} {base}"

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in_features]` to `[..., out_features]`, in the dtype of `input` or of autocast."""
        if input.shape[-1] != self.in_features:
            raise ValueError(f"{input.shape[-1]} inputs for a linear that has {self.in_features}")
        device = "cuda" if input.is_cuda else "cpu"  # reading `device.type` takes twice as long
        if torch.is_autocast_enabled(device) and input.dtype in _CAST:
            input = input.to(torch.get_autocast_dtype(device))
        # straight from the dictionary: at batch 1 attribute lookups of modules take as long as the product
        stored: dict[str, Any] = self._buffers if self._embedding is None else self._embedding._buffers
        output, up, down = self._base(input, stored), stored["up"], stored["down"]
        if stored["values"] is not None:
            output = self._add_sparse(output, input, stored)
        return output if up is None or down is None else self._add(output, input, up, down)

    def _base(self, input: Tensor, stored: dict[str, Any]) -> Tensor:
        """What codes and bias give."""
        if isinstance(self.coding, EntropyCoding):
            weight, bias = self._decoded().to(input.dtype), self.bias
            return nn.functional.linear(input, weight, None if bias is None else bias.to(input.dtype))
        order = stored["order"]
        if self.rounds or self.simulated is not None:
            input = self._to_be_rounded(input, stored)
        else:
            input = transformed(input, stored)
        if self.simulated is None:
            return self._product(input, order, stored)
        assert isinstance(self.coding, ScaledCoding)  # others come with no rounded inputs
        rounded = _Rounded.apply(
            _ordered(input, order), self.coding.group_size, self.simulated, self.input_scale
        )
        return self._product(rounded, None, stored).to(input.dtype)

    def to_be_rounded(self, input: Tensor) -> Tensor:
        """What is rounded where inputs are: `input` behind the transform, in the order in which it came.

        Inputs that only the sparse part multiplies are zeros.
        """
        return self._to_be_rounded(input, self._buffers)

    def _to_be_rounded(self, input: Tensor, stored: dict[str, Any]) -> Tensor:
        if stored["values"] is not None:
            input = self._without_apart(input, stored)
        return transformed(input, stored)

    def _product(self, input: Tensor, order: Tensor | None, stored: dict[str, Any]) -> Tensor:
        """What codes and bias give for inputs that are to be put in `order`, through the fastest path."""
        assert not isinstance(self.coding, EntropyCoding)  # which has no codes of groups or tables
        codes = stored["codes"]
        gradient = input.requires_grad and torch.is_grad_enabled()
        fast = self._native or self._fast
        if torch.compiler.is_compiling() and fast is not None and not gradient:
            layout = fast.layout
            if isinstance(layout, native.Tiles) and (
                input.dtype == torch.float32
                or (input.dtype == torch.bfloat16 and (self.rounds or layout.table is not None))
            ):
                output = native.traced_linear(_ordered(input, order), layout, self.rounds)
                return output if self.bias is None else output + self.bias.to(output.dtype)
        rows = input.numel() // self.in_features
        if rows == 0:  # not a weight's worth of work
            return input[..., :1].expand(*input.shape[:-1], self.out_features).contiguous()
        path = dispatch.find(
            self.coding, self.in_features, rows, input.dtype, codes.device, self.rounds, gradient
        )
        if path is None:
            return reference.linear(
                _ordered(input, order),
                codes,
                expanded_scales(stored),
                stored["zeros"],
                in_features=self.in_features,
                bias=self.bias,
                tables=stored["tables"],
                **unpacking(self.coding),
            )
        if path.as_stored:
            layout = self._prepare(path, order=order)
        else:
            input, layout = _ordered(input, order), self._layout(path, stored)
        output = path.multiply(input.reshape(-1, self.in_features), layout)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return output.reshape(*input.shape[:-1], self.out_features)

    def _add(self, output: Tensor, input: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """`output` with the low-rank part's share, compiled where it runs here and no gradient is needed."""
        if not _adds_compiled(output, input):
            wide = torch.promote_types(input.dtype, down.dtype)
            low = nn.functional.linear(input.to(wide), down.to(wide))
            return output + nn.functional.linear(low, up.to(wide)).to(output.dtype)
        factors = self._factors
        if factors is None or not factors.current(up, down):
            factors = self._factors = additions.LowRankFactors(up, down)
        rows = input.reshape(-1, self.in_features)
        return additions.add_low_rank(
            output.reshape(-1, self.out_features), rows, factors.down, factors.up
        ).reshape(output.shape)

    def _add_sparse(self, output: Tensor, input: Tensor, stored: dict[str, Any]) -> Tensor:
        """`output` with the sparse part's share, compiled likewise."""
        counts, columns, values = (stored[name] for name in SPARSE_PARTS)
        if not _adds_compiled(output, input):
            return output + additions.sparse_linear(input, counts, columns, values)
        sparse, rows = self._sparse_rows(counts, columns, values), input.reshape(-1, self.in_features)
        return additions.add_sparse(output.reshape(-1, self.out_features), rows, sparse).reshape(output.shape)

    def _without_apart(self, input: Tensor, stored: dict[str, Any]) -> Tensor:
        """`input` with zeros where codes have nothing to multiply, so that they don't widen steps."""
        apart = self._inputs_apart(stored)
        return input.index_fill(-1, apart, 0) if len(apart) else input

    def inputs_apart(self) -> Tensor:
        """Inputs that only the sparse part multiplies, int64; zeros where inputs are rounded."""
        return torch.empty(0, dtype=torch.int64) if self.values is None else self._inputs_apart(self._buffers)

    def _inputs_apart(self, stored: dict[str, Any]) -> Tensor:
        kept = self._apart
        if kept is None or not kept.current(stored):
            kept = self._apart = _InputsApart(self)
        return kept.inputs

    def sparse_rows(self) -> additions.SparseRows:
        """The sparse part as compiled code reads it; there is one."""
        stored = self._stored()
        return self._sparse_rows(*(stored[name] for name in SPARSE_PARTS))

    def _sparse_rows(self, counts: Tensor, columns: Tensor, values: Tensor) -> additions.SparseRows:
        kept = self._rows
        if kept is None or not kept.current(counts, columns, values):
            kept = self._rows = additions.StoredRows(counts, columns, values, self.in_features)
        return kept.rows

    def native_layout(self, arena: native.Arena) -> native.Tiles | native.TableRows:
        """The weight as the compiled products read it, made once, in `arena`; its coding must suit them."""
        stored: dict[str, Any] = self._buffers if self._embedding is None else self._embedding._buffers
        prepare = native.tiles if self.tables is None else native.table_rows
        path = next(p for p in dispatch.PATHS if p.prepare is prepare)
        fast = self._native
        if fast is None or not fast.current(stored):
            self._native = None  # frees the old one first
            fast = _FastWeight(path, self, arena=arena)
            self._native = fast
            arena.let_go(self.codes)  # the layout is read from now on
        return fast.layout

    def _layout(self, path: dispatch.Path, stored: dict[str, Any]) -> Any:
        """The weight as `path` reads it. Another thread may be making one: each keeps to its own."""
        for fast in (self._fast, self._native):
            if fast is not None and fast.serves(path, stored):
                return fast.layout
        fast = None
        self._fast = None  # frees the old one first
        fast = _FastWeight(path, self)
        self._fast = fast
        return fast.layout

    def _prepare(self, path: dispatch.Path, **settings: Any) -> Any:
        assert not isinstance(self.coding, EntropyCoding)  # no path runs those
        if self.tables is not None:
            settings["tables"] = self.tables
        return path.prepare(
            self.codes,
            self._scales(),
            self.zeros,
            in_features=self.in_features,
            **unpacking(self.coding),
            **settings,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, coding={self.coding.label}"
        )


class _Rounded(torch.autograd.Function):
    """`reference.round_inputs`, or to a static scale, for the gradient the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_size: int, to: str, scale: float | None) -> Tensor:
        ctx.dtype = x.dtype
        if scale is not None:
            return reference.round_to_scale(x, scale)
        return reference.round_inputs(x, group_size, to)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient.to(ctx.dtype), None, None, None


def _adds_compiled(output: Tensor, input: Tensor) -> bool:
    """Whether the compiled additions run on these."""
    if torch.is_grad_enabled() and (input.requires_grad or output.requires_grad):
        return False
    return additions.serves(input) and native.available() and not torch.compiler.is_compiling()


def _ordered(input: Tensor, order: Tensor | None) -> Tensor:
    """`input` in the order of the stored columns."""
    return input if order is None else input.index_select(-1, order)


class _Sources:
    """Which stored tensors something was made from, and in which state."""

    def __init__(self, module: CompressedLinear) -> None:
        self.sources = [
            (name, weakref.ref(tensor), _version(tensor)) for name, tensor in module._stored().items()
        ]

    def current(self, stored: dict[str, Tensor | None]) -> bool:
        """Whether it is still what these tensors give, unchanged since."""
        for name, source, version in self.sources:
            tensor = stored[name]
            if tensor is None or source() is not tensor or _version(tensor) != version:
                return False
        return True


class _FastWeight(_Sources):
    """A fast path's layout."""

    def __init__(self, path: dispatch.Path, module: CompressedLinear, **settings: Any) -> None:
        super().__init__(module)
        self.path = path
        self.layout = module._prepare(path, **settings)

    def serves(self, path: dispatch.Path, stored: dict[str, Tensor | None]) -> bool:
        """Whether the layout is that of `path` and of these tensors, unchanged since."""
        return self.path.prepare is path.prepare and self.current(stored)


class _InputsApart(_Sources):
    """Inputs whose column stands in the sparse part alone, its codes being those of zeros."""

    def __init__(self, module: CompressedLinear) -> None:
        super().__init__(module)
        stored = module._stored()
        inputs = whole_columns({name: stored[name] for name in SPARSE_PARTS}, module.in_features)
        if len(inputs):
            base = module.packed().base.dequantize()[:, inputs]
            inputs = inputs[(base == 0).all(0)]
        self.inputs = inputs


def _version(tensor: Tensor) -> int:
    """Number of in-place changes so far; inference tensors don't count them."""
    return 0 if tensor.is_inference() else tensor._version


class CompressedEmbedding(_PackedModule, nn.Embedding):
    """`nn.Embedding` over a packed weight: dequantizes the rows that are asked for, and only those.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    coding : IntegerCoding, CodebookCoding, VectorCoding, DoubleCoding, TableCoding or EntropyCoding
    padding_idx : int, optional
        Kept for whoever reads it; its row is what is stored.
    device : torch.device or str, optional
        `meta` is possible.

    Attributes
    ----------
    compute_dtype : torch.dtype
        Of the output and of `weight`. float32 unless set, or changed by `.to(dtype)`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        coding: PackedCoding,
        padding_idx: int | None = None,
        has_order: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self._create(num_embeddings, embedding_dim, coding, has_order, device)

    @classmethod
    def from_packed(cls, packed: PackedWeight, padding_idx: int | None = None) -> CompressedEmbedding:
        """An embedding that holds the tensors of `packed`, without copying."""
        if packed.named_part is not None:
            raise SettingsError(
                f"an embedding with {packed.named_part}",
                "codes alone",
                "leave that to linears",
            )
        if isinstance(packed.coding, FloatCoding):
            raise SettingsError(
                f"a packed weight of coding `{packed.coding.label}`",
                "integers, a codebook, points, tables or entropy-coded values",
                "put the weight into an ordinary nn.Embedding",
            )
        module = cls(
            packed.out_features,
            packed.in_features,
            packed.coding,
            padding_idx,
            "order" in packed.tensors,
            device="meta",
        )
        for name, tensor in packed.tensors.items():
            setattr(module, name, tensor)
        return module

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized table `[num_embeddings, embedding_dim]` in `compute_dtype`; changing it raises."""
        return self._read_weight()

    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` to vectors `[..., embedding_dim]` in `compute_dtype`."""
        if isinstance(self.coding, EntropyCoding):
            return nn.functional.embedding(input, self._decoded().to(self.compute_dtype))
        ids, scales = input.reshape(-1), self._scales()
        rows = reference.dequantize(
            self.codes.index_select(0, ids),
            None if scales is None else scales.index_select(0, ids),
            None if self.zeros is None else self.zeros.index_select(0, ids),
            in_features=self.embedding_dim,
            dtype=self.compute_dtype,
            order=self.order,
            tables=None if self.tables is None else self.tables.index_select(0, ids),
            **unpacking(self.coding),
        )
        return rows.view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, coding={self.coding.label}"


def share(embedding: CompressedEmbedding, head: CompressedLinear) -> None:
    """Make `head` compute with the stored tensors of `embedding`, whatever happens to those later.

    `head` gives up its own and has none in its state dict; a tied pair is stored once, under the
    embedding's name. Its bias stays its own.

    Raises
    ------
    CheckpointError
        When the two differ in shape or coding, or in whether columns are permuted.
    """
    ours = (*embedding._shape(), embedding.coding.label, embedding.order is not None)
    theirs = (*head._shape(), head.coding.label, head.order is not None)
    if ours != theirs:
        raise CheckpointError(
            f"a head {theirs} tied to an embedding {ours}",
            "one shape, coding and order for both",
            "state the same coding for the two, or untie them",
        )
    for name in PARTS:
        del head._buffers[name]
    head.__dict__["_embedding"] = embedding
    head._fast = head._native = None
