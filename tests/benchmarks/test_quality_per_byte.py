"""The evaluator of all subjects: nothing lost is nothing, windows add up, pairs cancel what they share."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import k_quants
import quality_child as child
import quality_per_byte as benchmark
from fit_quality import Subject
from results import text_file
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.recipe import parse_recipe
from tailorbird.evaluate.streamed import measure_quality
from tailorbird.formats.gguf import interleave_rotary
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.writing import write_tensors
from tiny import save_model


@pytest.fixture
def opened(tmp_path: Path) -> benchmark.Opened:
    model = save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    subject = Subject("tiny", str(model), str(text_file(tmp_path)), None)
    return benchmark.open_subject(subject, tmp_path)


def changed(opened: benchmark.Opened, folder: Path, noise: float) -> Path:
    """A checkpoint whose linears are off by so much."""
    torch.manual_seed(0)
    weights = {name: opened.work.checkpoint.weights.read(f"{name}.weight").float() for name in opened.linears}
    noisy = {name: weight + noise * torch.randn_like(weight) for name, weight in weights.items()}
    write_tensors(folder / "linears.safetensors", noisy)
    return benchmark.dense_checkpoint(opened, folder / "linears.safetensors", folder / "dense")


def test_the_sources_own_linears_lose_nothing(opened: benchmark.Opened, tmp_path: Path) -> None:
    found = benchmark.measured(benchmark.per_window(opened, changed(opened, tmp_path, 0.0), tmp_path))
    assert set(found["kl_windows"]) == {0.0}
    assert found["perplexity"] == found["perplexity_before"]
    assert found["top1_agreement"] == 1.0


def test_windows_add_up_to_what_the_gate_measures(opened: benchmark.Opened, tmp_path: Path) -> None:
    dense = changed(opened, tmp_path, 0.02)
    ids = opened.work.texts.held_out.ids
    found = benchmark.measured(benchmark.per_window(opened, dense, tmp_path))
    checkpoint = open_checkpoint(str(dense))
    whole = measure_quality(
        StreamingModel(opened.work.checkpoint, opened.work.anatomy),
        StreamingModel(checkpoint, read_anatomy(checkpoint)), ids, tmp_path,
    )  # fmt: skip
    assert len(found["kl_windows"]) == len(ids) > 1
    assert found["tokens"] == whole.tokens
    assert found["kl_mean"] == pytest.approx(whole.kl_mean) != 0
    for ours, theirs in (
        ("perplexity_before", whole.perplexity_before),
        ("perplexity", whole.perplexity_after),
    ):
        assert found[ours] == pytest.approx(theirs)
    assert found["top1_agreement"] == pytest.approx(whole.top1_agreement)


def test_bytes_of_unrounded_linears_are_those_of_the_source(opened: benchmark.Opened) -> None:
    weights = opened.work.checkpoint.weights
    bits = 8 * weights.info(f"{opened.linears[0]}.weight").dtype.itemsize
    assert benchmark.stored_bytes(opened, bits) == weights.total_bytes


def test_what_two_subjects_share_falls_out_of_their_difference() -> None:
    texts = [0.1, 0.9, 0.4, 0.6]
    mean, error = benchmark.paired_difference([kl + 0.05 for kl in texts], texts)
    assert mean == pytest.approx(0.05)
    assert error == pytest.approx(0.0, abs=1e-12)
    mean, error = benchmark.paired_difference([0.0, 2.0], [0.0, 0.0])
    assert (mean, error) == (1.0, pytest.approx(1.0))
    assert math.isnan(benchmark.paired_difference([1.0], [0.0])[1])


def test_what_fits_in_a_peers_bytes_is_paired_with_that_peer(capsys: pytest.CaptureFixture[str]) -> None:
    windows = {
        "gptq": [0.3, 0.5, 0.4, 0.6],
        "hqq": [0.5, 0.9, 0.6, 1.2],
        "fit-fast@hqq": [0.2, 0.5, 0.4, 0.9],
        "fit-fast@quanto": [0.2, 0.5, 0.4, 0.9],
        "rtn": [0.4, 0.6, 0.5, 0.7],
    }
    cells = [
        {
            "subject": name, "bits": 3, "bits_per_weight": 3.3, "total_bytes": 1234, "held_out": "text",
            "kl_mean": sum(kl) / len(kl), "kl_windows": kl, "perplexity": 2.0, "perplexity_before": 1.0,
            "top1_agreement": 0.5, "seconds": 1.0, "peak_rss_bytes": 1 << 20,
        }
        for name, kl in windows.items()
    ]  # fmt: skip
    own = {cell["subject"]: cell for cell in cells}
    mean, error = benchmark.paired_difference(windows["fit-fast@hqq"], windows["hqq"])
    told = ("hqq", f"{mean:+.4f} ± {error:.4f}", f"{mean / error:+.1f}")
    assert benchmark.beside("fit-fast@hqq", own, "gptq") == told
    assert benchmark.beside("fit-fast@quanto", own, "gptq") == ("", "", "")  # whose cell isn't there
    assert benchmark.beside("hqq", own, "gptq")[0] == "gptq"
    assert benchmark.beside("gptq", own, "gptq") == ("", "", "")
    assert benchmark.beside("rtn", own, "gptq")[1].startswith("+0.1000 ± 0.0000")
    own["hqq"]["held_out"] = "another text"
    assert benchmark.beside("fit-fast@hqq", own, "gptq") == ("", "", "")
    own["hqq"]["held_out"] = "text"
    benchmark.show("tiny", cells, "gptq")
    row = next(line for line in capsys.readouterr().out.splitlines() if "fit-fast@hqq" in line)
    assert all(text in row for text in told)


def test_fit_gets_the_bytes_of_the_peers_cell(
    opened: benchmark.Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    assert benchmark.budget_for("gptq", opened, 3) == {}
    assert benchmark.budget_for("fit-best@hqq", opened, 3) is None
    cell = tmp_path / benchmark.CELLS / opened.subject.name / "3-bits" / "hqq.json"
    cell.parent.mkdir(parents=True)
    cell.write_text('{"failed": "no such linears"}')
    assert benchmark.budget_for("fit-best@hqq", opened, 3) is None
    cell.write_text('{"total_bytes": 1234}')
    narrowed = benchmark.narrowed_bytes(opened)
    given = {"effort": "best", "memory": str(1234 - narrowed)}
    assert benchmark.budget_for("fit-best@hqq", opened, 3) == given


@pytest.mark.parametrize("tied", [True, False])
def test_ends_of_a_float32_model_are_worth_half_of_their_bytes(tied: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama", num_hidden_layers=1, tie_word_embeddings=tied)
    opened = benchmark.open_subject(Subject("tiny", str(model), str(text_file(tmp_path)), None), tmp_path)
    weights = opened.work.checkpoint.weights
    embedding = weights.info("model.embed_tokens.weight")
    assert embedding.dtype == torch.float32
    assert benchmark.narrowed_bytes(opened) == embedding.nbytes // (2 if tied else 1)


def test_what_a_peer_moves_between_norms_and_linears_is_carried_over(
    opened: benchmark.Opened, tmp_path: Path
) -> None:
    weights = opened.work.checkpoint.weights
    moved = {name: weights.read(f"{name}.weight").float() for name in opened.linears}
    norm = "model.layers.0.input_layernorm"
    moved[norm] = weights.read(f"{norm}.weight").float() / 4
    for name in ("q_proj", "k_proj", "v_proj"):
        moved[f"model.layers.0.self_attn.{name}"] *= 4
    write_tensors(tmp_path / "linears.safetensors", moved)
    dense = benchmark.dense_checkpoint(opened, tmp_path / "linears.safetensors", tmp_path / "dense")
    assert set(benchmark.measured(benchmark.per_window(opened, dense, tmp_path))["kl_windows"]) == {0.0}


def test_peers_get_an_equal_model_where_linears_are_stored_transposed(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gpt2")
    subject = Subject("tiny", str(model), str(text_file(tmp_path)), None)
    transposed = benchmark.open_subject(subject, tmp_path).transposed
    stored = child.load({"model": str(model), "transposed": []})
    plain = child.load({"model": str(model), "transposed": transposed})
    assert transposed
    for name in transposed:
        assert isinstance(plain.get_submodule(name), torch.nn.Linear)
        assert torch.equal(plain.get_submodule(name).weight.T, stored.get_submodule(name).weight)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, stored(ids).logits)


def test_every_peer_has_its_run_and_no_other() -> None:
    assert set(benchmark.PEERS) == set(child.PEERS)


def test_every_subject_of_ours_is_a_recipe() -> None:
    for name in benchmark.OWN:
        for bits in benchmark.WIDTHS.get(name, (2, 3, 4)):
            parse_recipe(child.recipe_of(name, bits, benchmark.GROUP))


def test_autorounds_best_settings_are_told_to_it_and_to_no_other() -> None:
    def told(subject: str, bits: int, steps: int | None = None) -> dict[str, object]:
        return child.autoround_settings({"subject": subject, "bits": bits, "steps": steps})

    assert told("autoround", 2) == {}
    assert told("autoround", 2, 7) == {"iters": 7}
    assert told("autoround-best", 2) == {"iters": 1000, "enable_alg_ext": True}
    assert told("autoround-best", 4) == {"iters": 1000}
    assert told("autoround-best", 2, 7) == {"iters": 7, "enable_alg_ext": True}


def test_what_a_child_leaves_where_it_runs_is_gone_and_its_paths_mean_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\nimport beside\nos.mkdir('logs')\nopen('log.txt', 'w').close()\n"
        "given = json.loads(sys.argv[1])\nassert open(given['ids']).read() == 'windows'\n"
        "os.mkdir(given['output'])\n"
        "print(json.dumps({**given, 'beside': beside.VALUE, 'where': os.getcwd()}))\n"
    )
    here = tmp_path / "here"
    (here / "packages").mkdir(parents=True)
    (here / "packages" / "beside.py").write_text("VALUE = 7\n")
    (here / "ids").write_text("windows")
    (here / "python").symlink_to(sys.executable)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", "packages")
    monkeypatch.setattr(benchmark, "CHILD", script)
    before = sorted(here.iterdir())
    settings = {"model": "demo", "calibration": None, "ids": "ids", "output": "result", "bits": 4}
    found = benchmark.run_child("./python", settings)
    assert sorted(here.iterdir()) == sorted([*before, here / "result"])
    assert not Path(found["where"]).exists()
    assert (found["model"], found["calibration"], found["bits"]) == ("demo", None, 4)
    assert (found["output"], found["beside"]) == (str(here / "result"), 7)


def test_rotated_pairs_lie_as_in_exported_files() -> None:
    rows = torch.arange(2 * 6 * 3).reshape(12, 3)
    together = k_quants.pairs_together(rows, 2)
    assert torch.equal(together, interleave_rotary(rows, 2))
    assert not torch.equal(together, rows)
    assert torch.equal(k_quants.pairs_apart(together, 2), rows)


def test_unrounded_blocks_stand_for_the_source(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = save_model(tmp_path / "model", "llama")
    source = child.load({"model": str(model), "transposed": []})
    config = source.config.to_dict()
    k_quants.write(source, config, tmp_path / "source.gguf")
    linears = [name for name, _ in source.named_modules() if name.endswith("_proj")]
    weights, bits = k_quants.read(tmp_path / "source.gguf", linears, config)
    assert bits == 32
    assert len(linears) >= 7
    for name in linears:
        assert torch.equal(weights[name], source.get_submodule(name).weight)
