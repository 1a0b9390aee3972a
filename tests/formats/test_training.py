"""Training through compressed linears: the gradients are those of a dense linear with the same weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from packed_weights import random_packed
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear, share
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native
from tailorbird.kernels.packing import BITS

BF16, F32 = torch.bfloat16, torch.float32
built = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


def compressed(
    coding: IntegerCoding, shape: tuple[int, int], order: bool = False, bias: bool = False
) -> CompressedLinear:
    values = torch.randn(shape[0], generator=torch.Generator().manual_seed(shape[0])) if bias else None
    return CompressedLinear.from_packed(random_packed(coding, shape, order), values)


def dense(module: CompressedLinear, dtype: torch.dtype) -> nn.Linear:
    """An ordinary linear with the weight of `module`, which gets no gradient."""
    twin = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=dtype)
    with torch.no_grad():
        twin.weight.copy_(module.weight)
        if module.bias is not None:
            twin.bias.copy_(module.bias)
    return twin.requires_grad_(False)


def activations(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def gradients(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradient of the input for a random gradient of the output."""
    x = x.detach().clone().requires_grad_()
    y = call(x)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(gradient.bfloat16().to(y.dtype))  # the same number in every dtype
    return [y.detach(), x.grad]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor], units: float) -> None:
    """Within `units` roundings of the dtype to the largest value of each tensor."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        step = 2.0**-8 if mine.dtype == BF16 else 2.0**-24
        assert (mine.double() - theirs.double()).abs().max() <= units * step * theirs.double().abs().max()


@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    group_size=st.sampled_from([0, 32, 64, 128]),
    shape=st.sampled_from([(1, 40), (33, 172), (130, 257), (64, 320)]),
    order=st.booleans(),
    bias=st.booleans(),
    rows=st.sampled_from([(1,), (2, 3), (48,), (600,)]),
    dtype=st.sampled_from([BF16, F32]),
)
@settings(max_examples=100, deadline=None)
def test_output_and_gradient_are_those_of_the_dense_weight(
    bits, symmetric, group_size, shape, order, bias, rows, dtype
) -> None:
    module = compressed(IntegerCoding(bits, group_size, symmetric), shape, order, bias)
    x = activations(*rows, shape[1], dtype=dtype)
    exact = gradients(dense(module.to(dtype), dtype).double(), x.double())
    assert_close(gradients(module, x), [tensor.to(dtype) for tensor in exact], 3 if dtype == BF16 else 64)


@built
def test_it_names_the_path_that_it_takes_with_a_gradient() -> None:
    module = compressed(IntegerCoding(4, 64), (32, 64))
    assert module.path(1, BF16, gradient=True) == "native-panels"
    assert module.path(600, BF16) == "native-panels"
    assert module.path(1, F32) == "native-float"
    assert module.path(1, torch.float64, gradient=True) == "reference"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_train_through_the_reference(dtype: torch.dtype) -> None:
    module = compressed(IntegerCoding(4, 64), (33, 172), order=True, bias=True).to(dtype)
    x = activations(5, 172, dtype=dtype)
    for mine, theirs in zip(gradients(module, x), gradients(dense(module, dtype), x), strict=True):
        torch.testing.assert_close(mine, theirs)


@built
@pytest.mark.parametrize("order", [False, True])
def test_nothing_of_the_size_of_the_dense_weight_is_kept_for_the_backward_pass(order: bool) -> None:
    module = compressed(IntegerCoding(4, 64), (96, 128), order)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        module(activations(600, 128))
    stored = {tensor.data_ptr() for tensor in module.buffers()}
    assert {tensor.data_ptr() for tensor in saved} == stored
    assert module._fast is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool) -> None:
    module = nn.Sequential(
        compressed(IntegerCoding(4, 64), (96, 128), order=True),
        nn.GELU(),
        compressed(IntegerCoding(3, 32), (64, 96), bias=True),
    )
    x = activations(20, 128)
    got = gradients(lambda x: checkpoint(module, x, use_reentrant=reentrant), x)
    # a reentrant checkpoint's first pass needs no gradient, and may take another path
    assert_close(got, gradients(module, x), 256 if reentrant else 0)


@pytest.mark.parametrize("rows", [1, 80])
@pytest.mark.parametrize("gradient", [False, True])
def test_autocast_decides_the_dtype_as_for_any_linear(gradient: bool, rows: int) -> None:
    module = compressed(IntegerCoding(4, 64), (96, 128), order=True, bias=True)
    twin = dense(module, F32)
    x = activations(rows, 128)
    with torch.autocast("cpu", BF16):
        if gradient:
            got, expected = gradients(module, x), gradients(twin, x)
        else:
            with torch.no_grad():
                got, expected = [module(x)], [twin(x)]
    assert got[0].dtype == BF16
    assert_close(got, expected, 3)
    assert module(x).dtype == F32


def test_without_gradients_a_training_input_takes_the_path_of_inference() -> None:
    module = compressed(IntegerCoding(4, 64), (96, 128))
    x = activations(3, 128)
    with torch.no_grad():
        y = module(x)
        assert torch.equal(y, module(x.detach()))
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(module(x), y)


def test_a_bias_can_be_trained() -> None:
    module = compressed(IntegerCoding(4, 64), (96, 128), bias=True)
    module.bias.requires_grad_()
    for rows in (3, 80):
        for x in (activations(rows, 128), activations(rows, 128).detach()):
            module.zero_grad()
            module(x).sum().backward()
            assert torch.equal(module.bias.grad, torch.full((96,), float(rows)))


def test_a_tied_head_trains_through_the_tensors_of_its_embedding() -> None:
    embedding = CompressedEmbedding.from_packed(random_packed(IntegerCoding(4, 32), (64, 96)))
    head = CompressedLinear(96, 64, IntegerCoding(4, 32), bias=False, device="meta")
    share(embedding, head)
    x = activations(5, 96)
    assert_close(gradients(head, x), gradients(dense(head, F32), x), 64)


@built
def test_torch_compile_traces_a_training_step_whole() -> None:
    module = compressed(IntegerCoding(4, 64), (96, 128), order=True, bias=True)
    x = activations(20, 128)
    expected = gradients(module, x)
    got = gradients(torch.compile(module, backend="aot_eager", fullgraph=True), x)
    assert_close(got, expected, 4)


class LowRank(nn.Module):
    """A linear that stays as it is, and a trained product of two thin matrices beside it (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) / 10)
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=generator) / 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


def test_an_adapter_trains_as_on_the_dense_weight() -> None:
    layers = [
        compressed(IntegerCoding(bits, 32, symmetric), shape, order, bias=True)
        for bits, shape, symmetric, order in [(4, (96, 128), False, True), (3, (128, 96), True, False)]
    ]
    for layer in layers:
        layer.scales.mul_(0.05)
    models = [
        nn.Sequential(LowRank(first, 4), nn.GELU(), LowRank(second, 4))
        for first, second in (layers, [dense(layer, F32) for layer in layers])
    ]
    x = activations(50, 128).detach()
    for _ in range(2):
        for model in models:
            optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        ours, theirs = ([p for p in model.parameters() if p.requires_grad] for model in models)
        assert len(ours) == 4
        assert all(p.grad.abs().max() > 0 for p in ours)
        assert_close([p.grad for p in ours], [p.grad for p in theirs], 256)
        assert_close([p.detach() for p in ours], [p.detach() for p in theirs], 256)
