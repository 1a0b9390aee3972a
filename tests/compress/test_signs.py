"""Signs before two magnitudes inside a compression: plans state them, results run by dequantizing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compressed import linears
from compressing import compress
from results import digests
from tailorbird.evaluate.stand_ins import Kernel, Weights
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import BinaryCoding, stored_bytes
from tailorbird.model.load import load
from tailorbird.run.fused import obstacle


@pytest.fixture(scope="module", params=[False, True], ids=["salient first", "static"])
def result(
    request: pytest.FixtureRequest, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool]:
    output, static = tmp_path_factory.mktemp("signs") / "out", request.param
    line = f"billm:binary=true,group=32,static_groups={str(static).lower()}"
    compress(model, text, output, line)
    return output, static


def test_every_linear_has_signs_and_its_bytes_are_counted(model: Path, result: tuple[Path, bool]) -> None:
    output, static = result
    modules = dict(load(output).named_modules())
    report = json.loads((output / "report.json").read_text())
    counted = {place["name"]: place["bytes"] for place in report["plan"]["places"]}
    for name in linears(load(model)):
        linear = modules[name]
        assert isinstance(linear, CompressedLinear)
        assert linear.coding == BinaryCoding(32)
        assert (linear.order is None) == static
        whole = stored_bytes(linear.coding, linear.out_features, linear.in_features, has_order=not static)
        assert linear.packed().nbytes == whole == counted[name]


def test_its_plan_gives_the_same_bytes_again(
    model: Path, text: Path, result: tuple[Path, bool], tmp_path: Path
) -> None:
    compress(model, text, tmp_path / "again", plan=result[0] / "plan.yaml")
    assert digests(tmp_path / "again") == digests(result[0])


def test_it_runs_as_its_dequantized_weights_do(model: Path, result: tuple[Path, bool]) -> None:
    ids = torch.arange(40).view(2, 20)
    packed, dense = load(result[0]), load(model)
    modules = dict(packed.named_modules())
    for name, linear in linears(dense).items():
        linear.weight.data = modules[name].weight.clone().view(linear.weight.shape)
        assert modules[name].path(1, torch.float32) == "reference"
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    reason = obstacle(packed)
    assert reason is not None
    assert ("binary g32" if result[1] else "reordered inputs") in reason


def test_no_compiled_block_is_timed_with_them() -> None:
    with pytest.raises(ValueError, match="binary g64"):
        Weights(Kernel(BinaryCoding(64)), 1).linear(64, 64)
