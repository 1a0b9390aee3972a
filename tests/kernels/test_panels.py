"""Products panel by panel: the values of the reference, its gradients, and never a dense weight."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from packed_weights import laid_out, random_packed
from tailorbird.formats import codebooks
from tailorbird.formats.packed import CodebookCoding, IntegerCoding, PackedWeight
from tailorbird.kernels import native, panels
from tailorbird.kernels.packing import BITS

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

# the C structures point at them
LEVELS = {name: levels.float() for name, levels in codebooks.LEVELS.items()}
BF16, F32 = torch.bfloat16, torch.float32
#: distance from 1 to the next number, halved
UNIT = {BF16: 2.0**-8, F32: 2.0**-24}

codings = st.builds(
    IntegerCoding,
    st.sampled_from(BITS),
    st.sampled_from([0, 32, 64, 96, 128, 256]),
    st.booleans(),
    st.sampled_from(["float16", "bfloat16"]),
) | st.builds(CodebookCoding, st.sampled_from(["nf4", "fp4", "gauss4"]), st.sampled_from([0, 32, 64, 256]))
shapes = st.tuples(st.sampled_from([1, 15, 16, 33, 130]), st.sampled_from([1, 31, 64, 172, 320, 1030]))
versions = st.sampled_from(native.versions() or (0,))


def stored_weight(packed: PackedWeight) -> panels.StoredWeight:
    return laid_out(panels.StoredWeight, packed)


def arguments(weight: panels.StoredWeight) -> tuple[Any, ...]:
    """As the operators take them."""
    return (
        weight.codes, weight.scales, weight.zeros, weight.order, weight.levels,
        weight.bits, weight.group_size, weight.in_features,
    )  # fmt: skip


def described(packed: PackedWeight) -> native.StoredStructure:
    weight = stored_weight(packed)
    levels = LEVELS[packed.coding.codebook] if isinstance(packed.coding, CodebookCoding) else None
    return native.described_as_stored(
        weight.codes, weight.scales, weight.zeros, weight.bits, weight.group_size, weight.in_features, levels
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(coding=codings, shape=shapes, dtype=st.sampled_from([BF16, F32]), version=versions, data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_rectangle_has_the_bits_of_the_reference(coding, shape, dtype, version, data) -> None:
    packed = random_packed(coding, shape)
    row = data.draw(st.integers(0, shape[0] - 1))
    column = data.draw(st.integers(0, (shape[1] - 1) // 16)) * 16
    rows = data.draw(st.integers(1, shape[0] - row))
    columns = data.draw(st.integers(1, shape[1] - column))
    to = torch.full((rows, columns), float("nan"), dtype=dtype)
    native.dequantize(described(packed), row, column, to, version)
    assert torch.equal(to, packed.dequantize(dtype)[row : row + rows, column : column + columns])


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_scales_of_every_size_and_sign_have_the_bits_of_the_reference(scale_dtype, dtype) -> None:
    shape = 512, 128 * 32
    packed = random_packed(IntegerCoding(8, 32, False, scale_dtype), shape)
    stored = packed.tensors["scales"]
    stored.copy_(torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(512, 128).view(stored.dtype))
    expected = packed.dequantize(dtype)
    for version in native.versions():
        to = native.dequantize(described(packed), 0, 0, torch.empty(shape, dtype=dtype), version)
        finite = expected.isfinite()
        assert torch.equal(to[finite].signbit(), expected[finite].signbit())
        assert torch.equal(to.nan_to_num(1, 2, 3), expected.nan_to_num(1, 2, 3))


@pytest.mark.parametrize("bits", BITS)
def test_the_number_of_threads_changes_no_value(bits: int) -> None:
    packed = random_packed(IntegerCoding(bits, 64), (600, 1024))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            to = native.dequantize(described(packed), 0, 0, torch.empty(600, 1024, dtype=BF16))
            assert torch.equal(to, packed.dequantize(BF16))
    finally:
        torch.set_num_threads(before)


def assert_is_product(got: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`got` is `left @ right`, sums in float32 and rounded once to the dtype of `left`."""
    left, right = left.double(), right.double()
    exact, size = left @ right, left.abs() @ right.abs()
    bound = (left.shape[1] + 4) * UNIT[F32] * size + UNIT[got.dtype] * exact.abs()
    assert ((got.double() - exact).abs() <= bound).all()


@given(
    coding=codings,
    shape=shapes,
    dtype=st.sampled_from([BF16, F32]),
    rows=st.sampled_from([1, 2, 7, 48, 600]),
    panel_bytes=st.sampled_from([20_000, panels.PANEL_BYTES]),
)
@settings(max_examples=150, deadline=None)
def test_product_and_gradient_are_those_of_the_dequantized_weight(
    coding, shape, dtype, rows, panel_bytes
) -> None:
    packed = random_packed(coding, shape)
    x = random(rows, shape[1]).to(dtype).requires_grad_()
    gradient = random(rows, shape[0]).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "PANEL_BYTES", panel_bytes)
        patch.setattr(panels, "FEWEST_COLUMNS", 1)  # no weight here is too high for a panel
        y = panels.linear(x, stored_weight(packed))
        y.backward(gradient)
    weight = packed.dequantize(dtype)
    assert_is_product(y.detach(), x.detach(), weight.t())
    assert_is_product(x.grad, gradient, weight)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("out_features", [96, 97, 150])
def test_gradients_of_a_vocabulary_are_added_in_float32(out_features, dtype, monkeypatch) -> None:
    monkeypatch.setattr(panels, "PANEL_BYTES", 32 * panels.FEWEST_COLUMNS * dtype.itemsize)  # 32 rows a panel
    packed = random_packed(IntegerCoding(4, 64), (out_features, 200))
    x = random(40, 200).to(dtype).requires_grad_()
    gradient = random(40, out_features).to(dtype)
    panels.linear(x, stored_weight(packed)).backward(gradient)
    left, weight = gradient.double(), packed.dequantize(dtype).double()
    pieces = [left[:, i : i + 32] @ weight[i : i + 32] for i in range(0, out_features, 32)]
    exact, rounded = left @ weight, sum(piece.abs() for piece in pieces)
    sums = (out_features + 4) * UNIT[F32] * (left.abs() @ weight.abs())
    bound = sums + UNIT[dtype] * (rounded + exact.abs()) * 1.01
    assert ((x.grad.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("group_size", [0, 64])
def test_a_gradient_has_a_gradient(group_size: int) -> None:
    packed = random_packed(IntegerCoding(3, group_size), (20, 100))
    x, gradient = random(4, 100).requires_grad_(), random(4, 20).requires_grad_()
    y = panels.linear(x, stored_weight(packed))
    (of_x,) = torch.autograd.grad(y, x, gradient, create_graph=True)
    (of_gradient,) = torch.autograd.grad(of_x, gradient, x.detach())
    assert torch.equal(of_gradient, y)  # the sum of gradient * y, differentiated by the gradient
    assert_is_product(of_x.detach(), gradient.detach(), packed.dequantize())


def test_nothing_but_the_stored_tensors_is_saved_for_the_backward_pass() -> None:
    packed = random_packed(IntegerCoding(4, 64), (96, 128))
    x = random(600, 128).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = panels.linear(x, stored_weight(packed))
    ours = {tensor.data_ptr() for tensor in packed.tensors.values()}
    assert {tensor.data_ptr() for tensor in saved} == ours
    y.sum().backward()
    packed.tensors["scales"].mul_(2)
    y = panels.linear(x, stored_weight(packed))
    packed.tensors["scales"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Largest(TorchDispatchMode):
    """Notes the largest memory behind any tensor that an operator returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", [(100_000, 64), (64, 60_000), (3000, 2000)])
def test_no_buffer_is_larger_than_a_panel(shape, dtype) -> None:
    packed = random_packed(IntegerCoding(4, 64), shape)
    x = random(2, shape[1]).to(dtype)
    weight = arguments(stored_weight(packed))
    with Largest() as largest:
        panels._linear(x, *weight)
        panels._linear_gradient(random(2, shape[0]).to(dtype), *weight)
    assert 0 < largest.bytes <= panels.PANEL_BYTES
    assert shape[0] * shape[1] * dtype.itemsize > panels.PANEL_BYTES


STEP = """
import resource, torch
from tailorbird.kernels import panels

def step(out_features, in_features, tokens):
    codes = torch.ones(out_features, in_features // 2, dtype=torch.uint8)
    scales = torch.ones(out_features, in_features // 64, dtype=torch.bfloat16)
    weight = panels.StoredWeight(codes, scales, None, 4, 64, in_features)
    x = torch.ones(tokens, in_features, dtype=torch.bfloat16, requires_grad=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    panels.linear(x, weight).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak

step(64, 64, 64)  # loads PyTorch's products
print(step(16384, 8192, 64))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts kilobytes")
def test_a_step_through_a_large_weight_takes_a_fraction_of_its_dense_size() -> None:
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    assert int(done.stdout) << 10 < 16384 * 8192 * 2 / 10


def test_the_operators_say_their_shapes_and_gradients() -> None:
    weight = stored_weight(random_packed(IntegerCoding(3, 32), (40, 100)))
    operators = torch.ops.tailorbird
    for operator, width in ((operators.panel_linear, 100), (operators.panel_linear_gradient, 40)):
        torch.library.opcheck(
            operator.default,
            (random(5, width).requires_grad_(), *arguments(weight)),
            test_utils=(
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_dynamic",
            ),
        )
