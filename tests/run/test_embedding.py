"""What enters the first block has the bits that the model's modules give, compiled or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressed import pack, save_compressed
from tailorbird.formats.codebooks import VECTOR_UNITS
from tailorbird.formats.modules import CompressedEmbedding
from tailorbird.formats.packed import CodebookCoding, Coding, IntegerCoding, VectorCoding
from tailorbird.kernels import native
from tailorbird.model.load import load
from tailorbird.run.embedding import embed_by, rows_of
from tailorbird.run.fused import FusedModel
from tiny import ARCHITECTURES, make_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

INT3, NF4 = IntegerCoding(3, 32), CodebookCoding("nf4", 32, "float16")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.tensor([0, 257, 3, 3, 255, 1, 100])


def entering(model: Any, ids: Tensor) -> Tensor:
    """What transformers gives the first block of a text."""
    seen: list[Tensor] = []

    def leave(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    body = model.base_model
    body = getattr(body, "decoder", body)
    layers = body.layers if hasattr(body, "layers") else body.h
    with torch.no_grad(), layers[0].register_forward_pre_hook(leave, with_kwargs=True):
        model(ids[None], use_cache=False)
    return seen[0][0].float()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


# OLMo's norms have no weights: with its embedding compressed there is no parameter that told the dtype.
CODINGS = {name: (None, INT3, NF4) if name != "olmo" else (None,) for name in ARCHITECTURES}
CASES = [(name, coding) for name in sorted(CODINGS) for coding in CODINGS[name]]


@pytest.mark.parametrize(("architecture", "coding"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_has_the_bits_of_the_modules(
    architecture: str, coding: Coding | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_compressed(tmp_path / "m", make_model(architecture, dtype=dtype), embedding=coding)
    model = load(str(tmp_path / "m"))
    assert model.dtype == dtype
    assert rows_of(model.get_input_embeddings()) is not None
    expected = entering(model, IDS)
    embedded = FusedModel(model).embed(IDS, torch.arange(len(IDS), dtype=torch.int32))
    assert same_bits(embedded, expected)


def unlike_scale(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, args, output: output * 2)


def shifted(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, args: (args[0] // 2,))


def limited(module: nn.Module) -> None:
    module.max_norm = 0.5


def wide(module: nn.Module) -> None:
    module.double()


def spread(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())


@pytest.mark.parametrize("change", [unlike_scale, shifted, limited, wide, spread])
def test_what_is_not_known_is_left_to_the_module(change: Any) -> None:
    module = nn.Embedding(258, 48)
    change(module)
    assert rows_of(module) is None
    with torch.no_grad():
        assert same_bits(embed_by(module)(IDS, IDS), module(IDS).float())


@pytest.mark.parametrize("change", [unlike_scale, shifted, wide])
def test_what_is_not_known_of_a_compressed_one_is_left_to_it(change: Any) -> None:
    module = CompressedEmbedding.from_packed(pack(torch.randn(258, 48), INT3))
    change(module)
    assert rows_of(module) is None
    assert same_bits(embed_by(module)(IDS, IDS), module(IDS).float())


def test_columns_in_another_order_are_left_to_the_module() -> None:
    packed = pack(torch.randn(258, 48), INT3, torch.randperm(48))
    module = CompressedEmbedding.from_packed(packed)
    assert rows_of(module) is None
    assert same_bits(embed_by(module)(IDS, IDS), module(IDS))


@pytest.mark.parametrize("places_dtype", [torch.bfloat16, torch.float32])
def test_positions_are_added_in_the_dtype_that_the_modules_take(places_dtype: torch.dtype) -> None:
    module = nn.Embedding(258, 48, dtype=torch.bfloat16)
    places = torch.randn(9, 48, dtype=places_dtype)
    positions = torch.tensor([8, 0, 1, 1, 5, 2, 3], dtype=torch.int32)
    with torch.no_grad():
        expected = (module(IDS) + places[positions.long()]).float()
    assert same_bits(embed_by(module, places)(IDS, positions), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("embedding", [None, INT3], ids=["dense", "int3"])
@pytest.mark.parametrize("id", [-1, 258])
def test_a_token_that_the_model_has_not_is_refused(
    architecture: str, embedding: Coding | None, id: int, tmp_path: Path
) -> None:
    save_compressed(tmp_path / "m", make_model(architecture), embedding=embedding)
    model = load(str(tmp_path / "m"))
    positions = torch.arange(2, dtype=torch.int32)
    with pytest.raises(IndexError):
        FusedModel(model).embed(torch.tensor([0, id]), positions)
    with pytest.raises(IndexError):
        model.get_input_embeddings()(torch.tensor([0, id]))


def test_what_is_looked_up_is_the_weight_as_it_is_now() -> None:
    """Tensors are shared, not copied."""
    module = nn.Embedding(258, 48)
    rows = rows_of(module)
    assert rows is not None
    with torch.no_grad():
        module.weight[3] = 7
    assert torch.equal(rows(torch.tensor([3])), torch.full((1, 48), 7.0))


@pytest.mark.parametrize("name", VECTOR_UNITS)
def test_points_are_read_by_their_module(name: str) -> None:
    module = CompressedEmbedding.from_packed(pack(torch.randn(300, 64), VectorCoding(name, 32)))
    assert rows_of(module) is None
    assert module(IDS.remainder(300)).isfinite().all()
