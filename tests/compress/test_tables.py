"""Tables inside a compression: methods fill them, plans state them, results run, the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compressed import linears
from compressing import compress
from results import digests
from tailorbird.errors import SettingsError
from tailorbird.evaluate.foreseen import shape_of
from tailorbird.evaluate.stand_ins import Kernel, Weights
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.formats.packed import IntegerCoding, LowRank, TableCoding, stored_bytes
from tailorbird.kernels import dispatch, native
from tailorbird.model.load import load
from tailorbird.run.fused import obstacle
from tailorbird.run.generate import FusedDecoding, ModuleDecoding, decode
from tiny import save_model

built = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@pytest.fixture(scope="module")
def result(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tables") / "out"
    compress(model, text, output, "ganq+eora:table=3,rounds=2,eora.rank=4,embedding_bits=8")
    return output


def packed(directory: Path) -> dict[str, CompressedLinear]:
    return {n: m for n, m in load(directory).named_modules() if isinstance(m, CompressedLinear)}


def test_every_linear_has_tables_and_ends_have_integers(model: Path, result: Path) -> None:
    found, source = packed(result), load(model)
    inside = {name: found[name] for name in linears(source)}
    for linear in inside.values():
        assert (linear.coding, linear.low_rank) == (TableCoding(3), LowRank(4))
        kept = sum(tensor.nbytes for tensor in linear.packed().base.tensors.values())
        assert kept == stored_bytes(TableCoding(3), linear.out_features, linear.in_features)
    assert {m.coding for n, m in found.items() if n not in inside} <= {IntegerCoding(8, 64)}
    embedding = load(result).get_input_embeddings()
    assert isinstance(embedding, CompressedEmbedding)
    assert embedding.coding == IntegerCoding(8, 64)
    report = json.loads((result / "report.json").read_text())
    measured = [p["measured"]["error"] for p in report["plan"]["places"] if p["measured"]]
    assert 0 < max(measured) < 0.1


def test_its_plan_gives_the_same_bytes_again(model: Path, text: Path, result: Path, tmp_path: Path) -> None:
    compress(model, text, tmp_path / "again", plan=result / "plan.yaml")
    assert digests(tmp_path / "again") == digests(result)


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        ("gpt2", "rtn:table=4,table_dtype=float16"),
        ("llama", "leanquant:table=2"),
        ("llama", "bcq:table=3,rounds=2"),
    ],
)
def test_other_methods_fill_them_too(architecture: str, recipe: str, text: Path, tmp_path: Path) -> None:
    compress(save_model(tmp_path / "model", architecture), text, tmp_path / "out", recipe)
    kinds = {linear.coding.kind for linear in packed(tmp_path / "out").values()}
    assert kinds == {"table"}


@built
def test_it_runs_in_compiled_blocks_whose_speed_is_foreseen(result: Path) -> None:
    model = load(result)
    assert obstacle(model) is None
    _, kernels = shape_of(model)
    assert {kernel.name for kernel in kernels} >= {"table3 · float"}
    stand_in = Weights(Kernel(TableCoding(3)), 1).linear(64, 64)
    assert stand_in.weight.tables
    ids = torch.arange(20).view(1, -1)
    decoding = decode(model)
    assert isinstance(decoding, FusedDecoding)
    slow = ModuleDecoding(model).read(ids)
    torch.testing.assert_close(decoding.read(ids), slow, rtol=1e-4, atol=1e-4)


@built
def test_beside_gradients_it_runs_through_the_reference(result: Path) -> None:
    linear = next(iter(packed(result).values()))
    for dtype in (torch.bfloat16, torch.float32):
        assert linear.path(1, dtype) == linear.path(64, dtype) == "native-tables"
        assert linear.path(1, dtype, gradient=True) == dispatch.REFERENCE
    x = torch.randn(5, linear.in_features)
    wanting = x.clone().requires_grad_()
    torch.testing.assert_close(linear(wanting), linear(x), rtol=1e-4, atol=1e-5)


def test_a_plan_is_refused_before_work_where_tables_have_no_place(
    model: Path, text: Path, result: Path, tmp_path: Path
) -> None:
    plan = yaml.safe_load((result / "plan.yaml").read_text())
    place = next(p for p in plan["places"] if p["coding"]["kind"] == "table")
    end = next(p for p in plan["places"] if p["coding"]["kind"] == "integer")

    def refused(message: str, **changes: Any) -> None:
        (tmp_path / "plan.yaml").write_text(json.dumps(plan | changes))
        with pytest.raises(SettingsError, match=message):
            compress(model, text, tmp_path / "out", plan=tmp_path / "plan.yaml")
        assert not (tmp_path / "out").exists()

    refused(r"`gptq` for codes of table3.*rtn, leanquant, ganq or bcq", method={"name": "gptq+eora"})
    place["activation"] = "int8"
    refused("`activation: int8` at .*whose weight holds values of tables")
    del place["activation"]
    stated, end["coding"] = end["coding"], place["coding"]
    refused(f"tables at `{end['name']}`.*integers")
    end["coding"] = stated
    place["coding"] = stated
    refused("`ganq` for codes of int8 g64.*table=4")
