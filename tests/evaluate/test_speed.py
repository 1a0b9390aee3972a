"""Speeds follow the clock, count what a step really reads, and compare two models in turns."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressed import save_compressed
from tailorbird.errors import SettingsError
from tailorbird.evaluate import foreseen
from tailorbird.evaluate import speed as speed_module
from tailorbird.evaluate.speed import (
    SpeedComparison,
    compare_in_child,
    compare_speed,
    linear_paths,
    product_weights,
    speed,
    step_bytes,
)
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import IntegerCoding, PackedWeight
from tailorbird.hardware.cost import AttentionTimes, KernelTimes
from tailorbird.kernels.blocks import STEPS
from tailorbird.model.json_file import read_json
from tailorbird.model.layout import ModelLayout, ModuleLayout
from tailorbird.model.load import load
from tailorbird.model.writing import write_json, write_tensors
from tiny import make_model, save_model

CODING = IntegerCoding(4, 32, symmetric=True)


ATTENTION = AttentionTimes(1e-9, 1e-9, 1e-9)
RATES = {f"{CODING.label} · float": ((1e-9, 1e-9),)}
TIMES = KernelTimes(
    threads=1, piece=512, tokens=(1,), products=RATES, heads=RATES,
    streaming=((1, 0.0),), block=1e-6, token=1e-6, norms=1e-9, activation=1e-9,
    alone=ATTENTION, alone_streamed=ATTENTION, together=ATTENTION, step=1e-4,
    step_streamed=1e-4, sequence=1e-6, begin=1e-6, begin_block=1e-6, logit=1e-9, lookup=1e-5, unpacked=1e-9,
)  # fmt: skip


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads 1e9 bytes and multiplies 1e12 times per second; measuring the real one takes seconds."""
    rates = {"fp32": 5e11, "bf16": 1e12, "int8": None}
    monkeypatch.setattr(speed_module, "probe", lambda: SimpleNamespace(read_bandwidth=1e9, matmul=rates))
    monkeypatch.setattr(foreseen, "kernel_times", lambda *_: TIMES)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "dense", "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    """The dense model with random codes for all linears of its blocks and for its (untied) head."""
    directory = dense.with_name("packed")
    directory.mkdir()
    model = make_model("llama", dtype=torch.bfloat16)
    tensors = dict(model.state_dict())
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            del tensors[f"{name}.weight"]
            codes = torch.randint(0, 16, (rows, columns))
            scales = torch.full((rows, -(-columns // 32)), 2.0**-6, dtype=torch.bfloat16)
            stored = PackedWeight.from_codes(codes, scales, None, CODING)
            tensors.update({f"{name}.{part}": tensor for part, tensor in stored.tensors.items()})
            modules[name] = ModuleLayout(rows, columns, CODING)
    write_tensors(directory / "model.safetensors", tensors)
    layout = ModelLayout(modules).to_dict()
    config = read_json(dense / "config.json")
    write_json(directory / "config.json", {**config, "quantization_config": layout})
    return directory


def test_all_fields_of_one_model(packed: Path) -> None:
    found = speed(packed, prompt_tokens=8, new_tokens=4, batch=2, rounds=2)
    model = load(packed)
    assert found.prefill_tokens_per_s > 0
    assert found.load_seconds > 0
    assert found.peak_rss_bytes > 50 << 20
    steps_per_s = found.decode_tokens_per_s / 2
    assert found.bandwidth_fraction == pytest.approx(step_bytes(model) * steps_per_s / 1e9)
    assert sum(found.paths.values()) == 2 * 7 + 1
    weights = product_weights(model)
    assert found.arithmetic_fraction == pytest.approx(2 * weights * found.prefill_tokens_per_s / 1e12)
    blocks = sum(m.out_features * m.in_features for n, m in model.named_modules() if n.endswith("_proj"))
    assert weights == blocks
    assert found.kernels is not None
    for parts in found.kernels.values():
        assert set(parts) == {*STEPS, "head", "rest"}
        assert all(seconds > 0 for seconds in parts.values())
    assert found.predicted is not None
    assert all(rate > 0 for rate in found.predicted.values())
    assert all(path.startswith("int4 g32 sym · ") for path in found.paths)


def test_threads_are_those_asked_for_and_put_back(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    run = speed_module._Subject.run
    monkeypatch.setattr(
        speed_module._Subject, "run", lambda self: (seen.append(torch.get_num_threads()), run(self))
    )
    speed(dense, prompt_tokens=2, new_tokens=1, threads=before + 1, rounds=1)
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def file_bytes(directory: Path, but: str = "none") -> int:
    from tailorbird.model.weights import Weights

    weights = Weights.open(directory)
    return sum(weights.info(name).nbytes for name in weights.names if but not in name)


@pytest.mark.parametrize(
    ("architecture", "looked_up"),
    [
        ("llama", lambda model: model.model.embed_tokens.weight.nbytes),
        ("qwen2", lambda model: 0),
        ("gpt2", lambda model: model.transformer.wpe.weight.nbytes),
    ],
)
def test_a_step_reads_all_but_looked_up_rows(architecture: str, looked_up: Any) -> None:
    """Untied: all but the embedding. Tied: all, once. Position tables are looked up, too."""
    model = make_model(architecture)
    parameters = sum(p.nbytes for p in model.parameters())
    rotary = sum(b.nbytes for b in model.buffers())
    assert step_bytes(model) == pytest.approx(parameters - looked_up(model), abs=rotary)


def test_a_step_of_a_packed_model_reads_what_is_stored(packed: Path) -> None:
    rotary = 8 * 64
    assert step_bytes(load(packed)) == pytest.approx(file_bytes(packed, but="embed_tokens"), abs=rotary)


def test_paths_of_a_dense_model() -> None:
    assert linear_paths(make_model("gpt2", dtype=torch.bfloat16), 1) == {"bf16 · dense": 2 * 4 + 1}


def test_paths_tell_rounded_inputs_from_exact_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint some of whose linears may round theirs: in compiled blocks, and outside of them."""

    def round_some(layout: ModelLayout) -> ModelLayout:
        names = [name for name in layout.modules if name.endswith(("up_proj", "down_proj"))]
        rounded = {name: replace(layout.modules[name], rounds=True) for name in names}
        return replace(layout, modules=layout.modules | rounded)

    def some(name: str) -> IntegerCoding | None:
        return None if name.endswith(("lm_head", "1.mlp.gate_proj")) else CODING

    monkeypatch.setattr(speed_module, "foresee", lambda *_: None)
    save_compressed(tmp_path / "mixed", make_model("llama"), some, layout=round_some)
    found = speed(tmp_path / "mixed", prompt_tokens=8, new_tokens=2, rounds=1).paths
    label = CODING.label
    assert found == {f"{label} · fused float": 9, f"{label} · fused int8": 4, "fp32 · fused dense": 2}
    model = load(tmp_path / "mixed")
    model.register_forward_hook(lambda *_: None)
    apart = linear_paths(model, 1)
    assert apart.pop("fp32 · dense") == 2
    assert sorted(apart.values()) == [4, 9]
    paths = {
        module.rounds: module.path(1, torch.float32)
        for module in model.modules()
        if isinstance(module, CompressedLinear)
    }
    assert apart == {f"{label} · {paths[False]}": 9, f"{label} · {paths[True]}": 4}


def test_comparison_takes_turns_and_takes_medians(
    dense: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only passes through the models move: the packed one is slower, and has a bad round."""
    order: list[str] = []
    clock = [0.0]

    def loader(path: Path, bits: int | None = None) -> Any:
        model = load(path)

        def before(*_: Any) -> None:
            order.append(path.name)
            slow_round = order.count("packed") in (3, 4, 5)
            clock[0] += 0.01 if path.name == "dense" else 100.0 if slow_round else 0.04

        model.register_forward_pre_hook(before)
        return model

    monkeypatch.setattr(speed_module, "load", loader)
    monkeypatch.setattr(speed_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = compare_speed(dense, packed, prompt_tokens=4, new_tokens=2, batch=3, rounds=3)
    assert found.source_decode_tokens_per_s == pytest.approx(3 / 0.01)
    assert found.result_decode_tokens_per_s == pytest.approx(3 / 0.04)
    assert found.source_prefill_tokens_per_s == pytest.approx(3 * 4 / 0.01)
    assert found.result_prefill_tokens_per_s == pytest.approx(3 * 4 / 0.04)
    assert found.ratio == found.prefill_ratio == pytest.approx(0.25)
    assert (found.slower, found.batch) == (True, 3)
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    # Warming dense and packed, then each round begins with the one that ended the last.
    assert turns == ["dense", "packed", "dense", "packed", "dense", "packed"]
    assert order.count("dense") == order.count("packed") == 2 + 3 * 3


def test_child_process_compares_short_contexts_too(packed: Path, tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", "llama", max_position_embeddings=12)
    found = compare_in_child(short, short)
    assert set(found) == {field.name for field in fields(SpeedComparison)}
    assert found["ratio"] == found["result_decode_tokens_per_s"] / found["source_decode_tokens_per_s"] > 0
    assert found["paths"] == {"fp32 · dense": 15}


def test_child_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        compare_in_child(tmp_path / "nowhere", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"threads": -1}, "--threads -1"),
        ({"prompt_tokens": 100, "new_tokens": 29}, "at most 128 together"),
    ],
)
def test_impossible_settings_are_refused(dense: Path, settings: dict[str, int], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        speed(dense, **settings)
