"""Rounded adapters are as close to exact ones as half a step of each number allows, and half as large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_adapters import logits, pair, prompt, save, wrapped
from tailorbird.kernels import native
from tailorbird.kernels.adapters import Adapter, BasisPart, LinearAdapter
from tailorbird.run.fused import FusedModel
from tailorbird.run.module_adapters import changed_rows
from tailorbird.run.paged import PagedModel
from tailorbird.serve.adapters.kinds import open_adapter, read_linears
from tailorbird.serve.adapters.rounded import rounded, rounded_linears
from tailorbird.serve.adapters.share import share
from tailorbird.serve.adapters.store import AdapterStore

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

Models = dict[str, FusedModel | PagedModel]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    fused, dense = pair(tmp_path_factory.mktemp("model") / "m", "llama")
    return {"fused": fused, "paged": PagedModel(dense)}


def saved(models: Models, directory: Path, kind: str = "lora") -> Path:
    targets = ["q_proj", "o_proj", "down_proj"]
    config = {
        "lora": peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
        "dora": peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=True),
        "vera": peft.VeraConfig(r=32, target_modules=["q_proj", "o_proj"]),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }[kind]
    return save(wrapped(models["paged"].model, config), directory)


def matrix_of(linear: LinearAdapter) -> Tensor:
    """B C diag(ranks) A in float64."""
    assert linear.down is not None
    assert isinstance(linear.up, Tensor)
    up, down = linear.up.double(), linear.down.double()
    return up @ middle(linear) @ down


def middle(linear: LinearAdapter) -> Tensor:
    assert linear.down is not None
    rank = len(linear.down)
    core = torch.eye(rank) if linear.core is None else linear.core
    return core.double() * (torch.ones(rank) if linear.ranks is None else linear.ranks).double()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_within_half_a_step_of_each_number(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rank = 1 + seed
    # ranks of very different sizes, one of them nothing
    down = (normal(rank, 40) * 10 ** (3 * normal(rank, 1))).to(dtype)
    up = (normal(24, rank) * 10 ** (3 * normal(1, rank))).to(dtype)
    if seed > 2:
        down[0], up[:, -1] = 0, 0
    linear = LinearAdapter(
        down, up, 0.5, core=normal(rank, rank) if seed % 2 else None, ranks=normal(rank) if seed % 3 else None
    )
    found = rounded(linear)
    found.check(24, 40, "here")
    assert found.scale == linear.scale
    assert isinstance(found.up, Tensor)
    assert found.down is not None
    assert found.down.dtype == found.up.dtype == torch.int8
    for codes, dim in ((found.down, 1), (found.up, 0)):  # no step is coarser than it has to be
        largest = codes.abs().amax(dim)
        assert set(largest.tolist()) <= {0, 127}
    a, b, m = down.double(), up.double(), middle(linear).abs()
    of_a = (a.abs().amax(1, keepdim=True) / 254).expand_as(a)
    of_b = (b.abs().amax(0, keepdim=True) / 254).expand_as(b)
    bound = of_b @ m @ a.abs() + b.abs() @ m @ of_a + of_b @ m @ of_a
    error = (matrix_of(found) - matrix_of(linear)).abs()
    assert bool((error <= bound * (1 + 1e-4) + 1e-6 * (b.abs() @ m @ a.abs())).all())
    assert rank < 2 or float(error.max()) > 0


@pytest.mark.parametrize("path", ["fused", "paged"])
@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_logits_move_little_of_what_the_adapter_moves(
    kind: str, path: str, models: Models, tmp_path: Path
) -> None:
    model, ids = models[path], prompt()
    exact = read_linears(open_adapter(saved(models, tmp_path / "a", kind), model.linears))
    plain, whole, less = (
        logits(model, ids, adapter)
        for adapter in (None, model.adapter(exact), model.adapter(rounded_linears(exact)))
    )
    moved, error = float((whole - plain).norm()), float((less - whole).norm())
    assert 0 < error < 0.03 * moved


@pytest.mark.parametrize("path", ["fused", "paged"])
def test_modules_and_blocks_take_the_codes_as_the_numbers_they_mean(path: str, models: Models) -> None:
    model, ids = models[path], prompt()
    generator = torch.Generator().manual_seed(0)
    codes, plain = {}, {}
    for number, place in enumerate(model.linears.values()):
        out_features, in_features = place.module.weight.shape
        down, up = torch.randn(4, in_features, generator=generator), torch.randn(out_features, 4)
        core = torch.randn(4, 4, generator=generator) if number % 2 else None
        linear = rounded(LinearAdapter(down, up, 0.02, core=core))
        assert linear.down is not None
        assert isinstance(linear.up, Tensor)
        codes[place.block, place.role] = linear
        plain[place.block, place.role] = LinearAdapter(
            linear.down.float(), linear.up.float(), 0.02, core=linear.core, ranks=linear.ranks
        )
    found, expected = (logits(model, ids, model.adapter(linears)) for linears in (codes, plain))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rows_of_a_linear_are_those_of_the_rounded_matrix() -> None:
    torch.manual_seed(0)
    linear = rounded(LinearAdapter(torch.randn(3, 16), torch.randn(8, 3), 0.5, core=torch.randn(3, 3)))
    x, y = torch.randn(5, 16), torch.randn(5, 8)
    expected = y.double() + 0.5 * x.double() @ matrix_of(linear).T
    torch.testing.assert_close(changed_rows(y, x, linear, None).double(), expected, atol=1e-4, rtol=1e-5)


def test_half_of_the_bytes_of_bfloat16(models: Models) -> None:
    for model in models.values():
        shapes = {(p.block, p.role): p.module.weight.shape for p in model.linears.values()}
        made = {
            place: LinearAdapter(torch.randn(16, columns).bfloat16(), torch.randn(rows, 16).bfloat16())
            for place, (rows, columns) in shapes.items()
        }
        before, after = model.adapter(made).nbytes, model.adapter(rounded_linears(made)).nbytes
        tables = model.adapter({}).nbytes
        assert after - tables == (before - tables) / 2 + len(made) * 16 * 4


def test_what_linears_or_adapters_share_stays_shared(models: Models, tmp_path: Path) -> None:
    fused = models["fused"]
    vera = rounded_linears(read_linears(open_adapter(saved(models, tmp_path / "v", "vera"), fused.linears)))
    assert len({id(linear.down) for linear in vera.values()}) == 1 < len(vera)
    share(fused.linears, [saved(models, tmp_path / "a")], tmp_path / "out", rank=4)
    exact = read_linears(open_adapter(tmp_path / "out" / "a", fused.linears))
    assert all(isinstance(linear.up, BasisPart) for linear in exact.values())
    assert rounded_linears(exact) == exact  # by identity
    factors = read_linears(open_adapter(saved(models, tmp_path / "i", "ia3"), fused.linears))
    assert rounded_linears(factors) == factors


def test_a_store_rounds_what_it_reads_and_lets_in_what_fits_then(models: Models, tmp_path: Path) -> None:
    fused, ids = models["fused"], prompt()
    assert isinstance(fused, FusedModel)
    directory = saved(models, tmp_path / "a")
    exact = read_linears(open_adapter(directory, fused.linears))
    expected = fused.adapter(rounded_linears(exact))
    assert expected.nbytes < 0.5 * fused.adapter(exact).nbytes
    store = AdapterStore(fused, expected.nbytes, bits=8)
    store.register("a", directory, trusted=True)
    handle = store.acquire("a")
    assert isinstance(handle.adapter, Adapter)
    assert store.bytes == expected.nbytes
    assert torch.equal(logits(fused, ids, handle.adapter), logits(fused, ids, expected))
    store.close()


def test_an_engine_is_told_by_its_options(models: Models, tmp_path: Path) -> None:
    from engines import engine, served

    path = served(tmp_path / "m", "llama")
    made: Any = engine(path, adapters={"a": str(saved(models, tmp_path / "a"))}, adapter_bits=8)
    store = made.store
    handle = store.acquire("a")
    kinds = {structure.down_kind for block in handle.adapter._table for structure in block if structure.down}
    assert kinds == {2}  # int8
    store.release(handle)
    store.close()
