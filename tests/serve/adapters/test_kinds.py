"""An adapter read from PEFT's directory gives what PEFT's own model gives, and others are refused by name."""

from __future__ import annotations

import copy
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_adapters import (
    change_config,
    expected_logits,
    logits,
    opened,
    opened_for_modules,
    pair,
    prompt,
    save,
    wrapped,
)
from tailorbird.errors import CheckpointError, SettingsError, UserError
from tailorbird.kernels import native
from tailorbird.kernels.adapters import Segment
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel
from tailorbird.run.paged import PagedModel
from tailorbird.run.parts import weight_rows
from tailorbird.serve.adapters.kinds import open_adapter, read_linears
from tailorbird.serve.adapters.lora import row_norms
from tailorbird.serve.adapters.vera import projections

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "opt": ["k_proj", "out_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj"],
}
#: linears whose inputs IA3 multiplies
INNER = {"llama": "down_proj", "qwen2": "down_proj", "gpt2": "mlp.c_proj", "opt": "fc2", "phi3": "o_proj"}

Pair = tuple[FusedModel, Any, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Models that are made once: as compiled blocks, as modules, and where they lie."""
    folder = tmp_path_factory.mktemp("models")
    return {name: (*pair(folder / name, name), folder / name) for name in TARGETS}


@pytest.fixture(scope="module")
def paged(pairs: dict[str, Pair]) -> dict[str, PagedModel]:
    """The same models through their modules, over pages."""
    return {name: PagedModel(load(str(folder))) for name, (_, _, folder) in pairs.items()}


def config_of(kind: str, architecture: str) -> Any:
    """PEFT's config of an adapter on many linears."""
    targets = TARGETS[architecture]
    match kind:
        case "rslora":
            return peft.LoraConfig(r=6, lora_alpha=3, target_modules=targets, use_rslora=True)
        case "patterns":
            layer = "transformer.h.0" if architecture == "gpt2" else "layers.0"
            return peft.LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=targets,
                rank_pattern={targets[0]: 9, rf"{layer}\..*{targets[-1]}": 2},
                alpha_pattern={rf".*\.1\..*{targets[1]}": 1, f"^{targets[0]}": 100},
            )
        case "dora":
            return peft.LoraConfig(r=5, lora_alpha=4, target_modules=targets, use_dora=True)
        case "vera":
            return peft.VeraConfig(r=16, target_modules=targets, projection_prng_key=3)
        case "vera without projections":
            return peft.VeraConfig(r=16, target_modules=targets, projection_prng_key=5, save_projection=False)
        case "ia3":
            inner = INNER[architecture]
            return peft.IA3Config(target_modules=[*targets[:2], inner], feedforward_modules=[inner])
    return peft.LoraConfig(r=8, lora_alpha=12, target_modules=targets)


@pytest.mark.parametrize("architecture", sorted(TARGETS))
@pytest.mark.parametrize(
    "kind", ["lora", "rslora", "patterns", "dora", "vera", "vera without projections", "ia3"]
)
def test_an_adapter_gives_what_peft_gives(
    kind: str, architecture: str, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    fused, dense, _ = pairs[architecture]
    made = wrapped(dense, config_of(kind, architecture))
    adapter = opened(fused, save(made, tmp_path / "a"))
    ids = prompt()
    found = logits(fused, ids, adapter)
    torch.testing.assert_close(found, expected_logits(made, ids), atol=1e-4, rtol=1e-4)
    assert float((found - logits(fused, ids, None)).abs().max()) > 1e-2  # it matters


@pytest.mark.parametrize("architecture", sorted(TARGETS))
@pytest.mark.parametrize("kind", ["lora", "patterns", "dora", "vera", "ia3"])
def test_a_model_that_runs_through_its_modules_gives_the_same(
    kind: str, architecture: str, pairs: dict[str, Pair], paged: dict[str, PagedModel], tmp_path: Path
) -> None:
    _, dense, _ = pairs[architecture]
    made, ids = wrapped(dense, config_of(kind, architecture)), prompt()
    adapter = opened_for_modules(paged[architecture], save(made, tmp_path / "a"))
    found = logits(paged[architecture], ids, adapter)
    torch.testing.assert_close(found, expected_logits(made, ids), atol=1e-4, rtol=1e-4)
    assert float((found - logits(paged[architecture], ids, None)).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "ia3"])
def test_stored_dtypes_are_read_as_peft_reads_them(
    kind: str, dtype: torch.dtype, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    fused, dense, _ = pairs["qwen2"]
    directory = save(wrapped(dense, config_of(kind, "qwen2")), tmp_path / "a")
    file = directory / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    made = peft.PeftModel.from_pretrained(copy.deepcopy(dense), directory).eval()
    ids = prompt()
    found = logits(fused, ids, opened(fused, directory))
    torch.testing.assert_close(found, expected_logits(made, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("qwen2", {"lora_bias": True}),
        ("qwen2", {"bias": "lora_only"}),
        ("qwen2", {"bias": "all"}),
        ("gpt2", {"bias": "lora_only"}),
        ("qwen2", {"bias": "lora_only", "lora_bias": True}),
        ("qwen2", {"bias": "lora_only", "use_dora": True}),
    ],
)
def test_biases_of_linears_are_served(
    architecture: str, settings: dict[str, Any], pairs: dict[str, Pair], tmp_path: Path
) -> None:
    fused, dense, _ = pairs[architecture]
    targets = ["c_attn", "c_fc"] if architecture == "gpt2" else ["q_proj", "k_proj"]
    made = wrapped(dense, peft.LoraConfig(r=4, target_modules=targets, **settings))
    ids = prompt()
    found = logits(fused, ids, opened(fused, save(made, tmp_path / "a")))
    torch.testing.assert_close(found, expected_logits(made, ids), atol=1e-4, rtol=1e-4)


def test_biases_of_norms_are_refused(pairs: dict[str, Pair], tmp_path: Path) -> None:
    fused, dense, _ = pairs["opt"]
    directory = save(wrapped(dense, peft.LoraConfig(target_modules=["fc1"], bias="all")), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias` \[64\] belongs to no linear"):
        open_adapter(directory, fused.linears)


def test_rows_of_a_batch_of_all_kinds_have_the_bits_of_each_alone(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    fused, dense, _ = pairs["qwen2"]
    kinds = ["lora", "rslora", "patterns", "dora", "vera", "ia3"]
    ranked = [peft.LoraConfig(r=rank, target_modules=["v_proj", "down_proj"]) for rank in (1, 64)]
    configs = [*(config_of(kind, "qwen2") for kind in kinds), *ranked]
    adapters = [
        opened(fused, save(wrapped(dense, config, seed=i), tmp_path / str(i)))
        for i, config in enumerate(configs)
    ]
    every = [*adapters, None]
    prompts = [prompt(5 + 3 * i, seed=i) for i in range(len(every))]
    lengths = torch.tensor([len(ids) for ids in prompts])
    bounds = [0, *lengths.cumsum(0).tolist()]
    pages = fused.pages(len(every))
    pages.reach(int(lengths.max()))
    together = fused.step(
        torch.cat(prompts),
        torch.cat([torch.arange(len(ids), dtype=torch.int32) for ids in prompts]),
        torch.arange(len(every), dtype=torch.int32).repeat_interleave(lengths),
        pages,
        torch.arange(bounds[-1]),
        [Segment(b, e, one) for (b, e), one in zip(pairwise(bounds), every, strict=True) if one is not None],
    )
    for ids, (begin, end), adapter in zip(prompts, pairwise(bounds), every, strict=True):
        assert torch.equal(together[begin:end], logits(fused, ids, adapter))


@pytest.mark.parametrize("key", [0, 3, 12345])
@pytest.mark.parametrize("shape", [(160, 64, 8), (64, 64, 1), (33, 257, 20)])
def test_projections_are_those_that_peft_draws(key: int, shape: tuple[int, int, int]) -> None:
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator().manual_seed(key)
    rows, columns, rank = shape
    expected = _kaiming_init((rank, columns), generator), _kaiming_init((rows, rank), generator)
    found = projections(rows, columns, rank, key)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_row_norms_are_found_a_few_rows_at_a_time(
    architecture: str, pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of packed weights, dense ones and transposed ones."""
    fused, dense, _ = pairs[architecture]
    looked_at: list[tuple[int, ...]] = []

    def noted(module: Any, rows: slice) -> torch.Tensor:
        found = weight_rows(module, rows)
        looked_at.append(found.shape)
        return found

    monkeypatch.setattr("tailorbird.serve.adapters.lora.weight_rows", noted)
    for path, place in fused.linears.items():
        weight = dense.get_submodule(path).weight.detach()
        weight = weight.t() if architecture == "gpt2" else weight
        out_features, in_features = weight.shape
        down, up = torch.randn(3, in_features), torch.randn(out_features, 3)
        expected = (weight + 0.3 * up @ down).norm(dim=1)
        for values in (1 << 18, 7 * in_features):
            monkeypatch.setattr("tailorbird.kernels.packing.CHUNK_VALUES", values)
            for module in (place.module, dense.get_submodule(path)):
                torch.testing.assert_close(row_norms(module, down, up, 0.3), expected)
                assert all(rows * columns <= values for rows, columns in looked_at)
                looked_at.clear()


def test_linears_that_share_projections_hold_them_once(pairs: dict[str, Pair], tmp_path: Path) -> None:
    fused, dense, _ = pairs["llama"]
    config = peft.VeraConfig(r=32, target_modules=["q_proj", "o_proj", "v_proj"])
    directory = save(wrapped(dense, config), tmp_path / "a")
    linears = read_linears(open_adapter(directory, fused.linears))
    downs = {linear.down.data_ptr() for linear in linears.values() if linear.down is not None}
    assert (len(linears), len(downs)) == (6, 1)
    own = sum(linear.up.nbytes for linear in linears.values() if linear.up is not None)
    assert own + 32 * 64 * 4 <= fused.adapter(linears).nbytes < own + 2 * 32 * 64 * 4


@pytest.fixture(scope="module")
def saved(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each kind for llama."""
    dense, folder = pairs["llama"][1], tmp_path_factory.mktemp("adapters")
    return {
        kind: save(wrapped(dense, config_of(kind, "llama")), folder / kind)
        for kind in ("lora", "dora", "vera", "vera without projections", "ia3")
    }


def copied(saved: Path, folder: Path) -> Path:
    return Path(shutil.copytree(saved, folder / "changed"))


def refused(fused: FusedModel, directory: Path, error: type[UserError], words: str) -> None:
    with pytest.raises(error, match=words):
        open_adapter(directory, fused.linears)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("lora", {"peft_type": "LOHA"}, r"`peft_type` is 'LOHA' · expected: one of LORA, VERA, IA3"),
        ("lora", {"peft_type": None}, "`peft_type` is 'None'"),
        ("lora", {"modules_to_save": ["lm_head"]}, r"`modules_to_save` is \['lm_head'\]"),
        ("lora", {"trainable_token_indices": [1]}, "`trainable_token_indices`"),
        ("lora", {"alora_invocation_tokens": []}, "`alora_invocation_tokens` is"),
        ("lora", {"alora_invocation_tokens": [1, -2]}, "`alora_invocation_tokens` is"),
        ("lora", {"alora_invocation_tokens": "1"}, "`alora_invocation_tokens` is"),
        ("lora", {"alora_invocation_tokens": [1], "use_dora": True}, "`use_dora` is True"),
        ("vera", {"alora_invocation_tokens": [1]}, "no `alora_invocation_tokens`"),
        ("lora", {"layer_replication": [[0, 2]]}, "`layer_replication`"),
        ("lora", {"use_qalora": True}, "`use_qalora`"),
        ("lora", {"of_the_future": 3}, "no `of_the_future`, which can't be served"),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, "leaves the model's weights alone"),
        ("lora", {"r": 0}, "`r` is 0 · expected: a whole number, at least 1"),
        ("lora", {"r": True}, "`r` is True"),
        ("lora", {"lora_alpha": "8"}, "`lora_alpha` is '8' · expected: a finite number"),
        ("lora", {"lora_alpha": 10**400}, "expected: a finite number"),
        ("lora", {"use_rslora": 1}, "`use_rslora` is 1 · expected: true or false"),
        ("lora", {"rank_pattern": {"(a+)+b": 2}}, "none of a group"),
        ("lora", {"rank_pattern": {"q_proj": 2.5}}, "ranks, whole numbers"),
        ("lora", {"rank_pattern": ["q_proj"]}, "`rank_pattern` is"),
        ("lora", {"alpha_pattern": {"(": 2}}, "`alpha_pattern` is"),
        ("lora", {"alpha_pattern": {"a*b*c*d*": 2}}, "with a few repeats"),
        ("vera", {"r": None}, "`r` is None"),
        ("vera without projections", {"projection_prng_key": -1}, "`projection_prng_key` is -1"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(
    kind: str,
    changes: dict[str, Any],
    words: str,
    pairs: dict[str, Pair],
    saved: dict[str, Path],
    tmp_path: Path,
) -> None:
    directory = copied(saved[kind], tmp_path)
    change_config(directory, changes)
    refused(pairs["llama"][0], directory, SettingsError, words)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "name", "change", "words"),
    [
        ("lora", f"{Q}.lora_A.weight", None, rf"`{Q}.lora_A.weight` \[8, 64\] is missing"),
        ("lora", f"{Q}.lora_B.weight", lambda t: t[:, :3], r"lora_B.weight` is \[64, 3\], not \[64, 8\]"),
        ("lora", f"{Q}.lora_A.weight", lambda t: t.long(), "is stored as torch.int64"),
        ("lora", f"{Q}.lora_B.bias", torch.zeros(64), r"lora_B.bias` \[64\] belongs to no linear"),
        ("lora", f"{Q}.base_layer.bias", torch.zeros(64), "belongs to no linear"),
        ("lora", "base_model.model.lm_head.lora_A.weight", torch.zeros(8, 64), "lm_head.lora_A.weight"),
        ("lora", "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", torch.zeros(8, 64), "layers.2"),
        ("lora", Q.replace("q_proj", "k_proj.lora_A.weight"), torch.zeros(8, 64), "that the config targets"),
        ("dora", f"{Q}.lora_magnitude_vector", None, "lora_magnitude_vector` .* is missing"),
        ("vera", "base_model.vera_A", None, "`base_model.vera_A` .* is missing"),
        ("vera", "base_model.vera_B", lambda t: t[:-1], "vera_B` is"),
        ("vera", f"{Q}.vera_lambda_d", lambda t: t[:5], r"vera_lambda_d` is \[5\], not \[16\]"),
        ("ia3", f"{Q}.ia3_l", lambda t: t.reshape(-1), r"ia3_l` is \[64\], not \[64, 1\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    kind: str,
    name: str,
    change: Any,
    words: str,
    pairs: dict[str, Pair],
    saved: dict[str, Path],
    tmp_path: Path,
) -> None:
    directory = copied(saved[kind], tmp_path)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous() if callable(change) else change
    save_file(tensors, file)
    refused(pairs["llama"][0], directory, CheckpointError, words)


def test_a_module_that_the_config_names_must_be_there(
    pairs: dict[str, Pair], saved: dict[str, Path], tmp_path: Path
) -> None:
    directory, fused = copied(saved["lora"], tmp_path), pairs["llama"][0]
    targets = TARGETS["llama"]
    change_config(directory, {"target_modules": [*targets, "k_proj"]})
    refused(fused, directory, CheckpointError, r"k_proj.lora_A.weight` .* is missing")
    change_config(directory, {"exclude_modules": ["k_proj"]})
    open_adapter(directory, fused.linears)
    change_config(directory, {"layers_to_transform": [0]})
    refused(fused, directory, CheckpointError, r"layers\.1\..* belongs to no linear of the blocks that")


def test_regular_expressions_that_name_modules_are_not_run(
    pairs: dict[str, Pair], saved: dict[str, Path], tmp_path: Path
) -> None:
    directory = copied(saved["lora"], tmp_path)
    change_config(directory, {"target_modules": "(a+)+$"})
    assert len(open_adapter(directory, pairs["llama"][0].linears).adapted) == 2 * len(TARGETS["llama"])


def test_factors_for_inputs_that_others_read_are_refused(pairs: dict[str, Pair], tmp_path: Path) -> None:
    fused, dense, _ = pairs["llama"]
    config = peft.IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"])
    refused(fused, save(wrapped(dense, config), tmp_path / "a"), SettingsError, "that other linears read")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "ia3"])
def test_what_is_not_finite_is_refused(
    kind: str, value: float, pairs: dict[str, Pair], saved: dict[str, Path], tmp_path: Path
) -> None:
    directory = copied(saved[kind], tmp_path)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    last = sorted(tensors)[-1]
    tensors[last].view(-1)[-1] = value
    save_file(tensors, file)
    adapter = open_adapter(directory, pairs["llama"][0].linears)
    with pytest.raises(CheckpointError, match=last):
        read_linears(adapter)


def test_pickles_are_never_opened(pairs: dict[str, Pair], saved: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(saved["lora"], tmp_path)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    refused(pairs["llama"][0], directory, CheckpointError, "pickled weights only")


def test_files_that_change_while_they_are_read_are_refused(
    pairs: dict[str, Pair], saved: dict[str, Path], tmp_path: Path
) -> None:
    directory = copied(saved["lora"], tmp_path)
    adapter = open_adapter(directory, pairs["llama"][0].linears)
    change_config(directory, {"lora_alpha": 100})
    with pytest.raises(CheckpointError, match="changed after"):
        read_linears(adapter)


def test_paths_that_lead_out_are_refused(
    pairs: dict[str, Pair], saved: dict[str, Path], tmp_path: Path
) -> None:
    linears = pairs["llama"][0].linears
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder in (allowed, outside):
        shutil.copytree(saved["lora"], folder / "a")
    (allowed / "link").symlink_to(outside / "a")
    linked = allowed / "files"
    linked.mkdir()
    for file in (outside / "a").iterdir():
        (linked / file.name).symlink_to(file)
    open_adapter(allowed / "a", linears, allowed)
    for path in (outside / "a", allowed / ".." / "outside" / "a", allowed / "link", linked, Path("a\0b")):
        with pytest.raises(SettingsError, match="below"):
            open_adapter(path, linears, allowed)
