"""Whatever is wrong with the input: status 2, words that name it and help, and nothing written.

Every case is a real command line on a real (small) model; no part of the program is replaced.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tailorbird
from tailorbird.cli.main import run
from tailorbird.errors import CheckpointError
from tailorbird.progress import Silent
from tiny import DECODER, byte_tokenizer, save_model

FIT = (
    "fit",
    "MODEL",
    "--memory",
    "45%",
    "-o",
    "out",
    "--calibration",
    "TEXT",
    "--sequences",
    "4",
    "--length",
    "32",
)
COMPRESS = ("compress", "MODEL", "-o", "out", "--calibration", "TEXT", "--sequences", "4", "--length", "32")
TUNE = ("tune", "MODEL", "--data", "TEXT", "-o", "out", "--steps", "4", "--batch", "1", "--save-every", "1")
Q = "model.layers.1.self_attn.q_proj.weight"


def write_text(path: Path, seed: int = 0, documents: int = 24) -> Path:
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=120))}) for _ in range(documents)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model; copied before it is damaged."""
    return save_model(tmp_path_factory.mktemp("sound") / "model", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def fitted(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The control: the same command with nothing wrong."""
    folder = tmp_path_factory.mktemp("fitted")
    patch = pytest.MonkeyPatch()
    patch.setenv("TAILORBIRD_CACHE", str(folder / "cache"))
    try:
        arguments = filled(FIT, model, text)
        arguments[arguments.index("out")] = str(folder / "out")
        assert run(arguments) == 0
    finally:
        patch.undo()
    return folder / "out"


def filled(arguments: tuple[str, ...], model: Path | str, text: Path | str) -> list[str]:
    """`arguments` with the paths in place of the words MODEL and TEXT."""
    return [str(model) if a == "MODEL" else str(text) if a == "TEXT" else a for a in arguments]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below `folder`: path -> size and time."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(
    command: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command line that must be refused with these words, and return the message.

    The current directory is the output's parent; neither it nor the source may change.
    """
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def call(*arguments: str, says: tuple[str, ...], usage: bool = False, source: Path | str = model) -> str:
        folders = [place] + [p for p in (Path(source),) if os.path.isdir(p) and p.is_absolute()]
        before = [tree(folder) for folder in folders]
        done = command(*filled(arguments, source, text))
        assert done.status == 2, done.err
        assert done.out == ""
        assert "Traceback" not in done.err
        assert usage or ("expected: " in done.err and "what to do: " in done.err)
        for words in says:
            assert words in done.err
        assert [tree(folder) for folder in folders] == before
        return str(done.err)

    return call


# --- the control ---------------------------------------------------------------------------------


def test_control_the_same_command_without_a_mistake_gives_a_model_that_writes(fitted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(fitted)
    tokens = AutoTokenizer.from_pretrained(fitted)("alpha beta", return_tensors="pt")
    written = loaded.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > tokens["input_ids"].shape[1]
    assert sorted(os.listdir(fitted.parent)) == ["cache", "out"]
    shares = json.loads((fitted / "report.json").read_text())["result"]
    assert shares["total_bytes"] <= shares["budget_bytes"]


# --- where the model is --------------------------------------------------------------------------

LEAST = {
    "fit": ("fit", "MODEL", "--memory", "45%", "-o", "out"),
    "compress": ("compress", "MODEL", "-o", "out", "--recipe", "rtn:bits=4,group=32"),
    "evaluate": ("evaluate", "MODEL", "--text", "TEXT"),
    "speed": ("speed", "MODEL"),
    "generate": ("generate", "MODEL", "alpha"),
    "export": ("export", "MODEL", "--to", "dense", "-o", "out"),
    "tune": TUNE,
}


@pytest.mark.parametrize("name", LEAST)
def test_no_such_path(refused: Any, name: str) -> None:
    refused(*LEAST[name], source="/no/such/path", says=("/no/such/path", "check the path"))


@pytest.mark.parametrize("name", LEAST)
def test_a_file_in_place_of_a_directory(refused: Any, model: Path, name: str) -> None:
    given = model / "config.json"
    refused(*LEAST[name], source=given, says=(f"{given} is a file", f"give its directory, `{model}`"))


@pytest.mark.parametrize("name", LEAST)
def test_a_directory_that_is_no_model(refused: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.txt").write_text("sea")
    refused(*LEAST[name], source=tmp_path / "holiday", says=("holiday has no config.json", "safetensors"))


@pytest.mark.parametrize("name", LEAST)
def test_a_hub_id_while_offline(refused: Any, name: str) -> None:
    refused(*LEAST[name], source="no-org/no-model", says=("no-org/no-model", "cannot be reached", "demo"))


@pytest.mark.parametrize("given", ["", "..", "a/../b", "x" * 300, "http://example.org/model"])
def test_what_cannot_name_a_model(refused: Any, given: str) -> None:
    refused(*FIT, source=given, says=("config.json",) if given == ".." else ("there is no directory",))


# --- what is in its files ------------------------------------------------------------------------


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def edit_json(file: str, **fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrite the header of the safetensors file, the body left as it is."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return edit


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def endless_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def remove(*patterns: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return edit


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change_last_byte(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)[0]
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last ^ 1]))


def spoil(value: float, name: str = Q) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors[name].view(-1)[5].fill_(value))


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated": (truncate, ("model.safetensors", "bytes")),
    "empty weights": (lambda f: os.truncate(f / "model.safetensors", 0), ("model.safetensors",)),
    "header longer than the file": (endless_header, ("model.safetensors", "header")),
    "offsets beyond the file": (
        edit_header(lambda h: h[Q].update(data_offsets=[2**40, 2**40 + 16384])),
        ("model.safetensors", "bodies that follow each other"),
    ),
    "offsets that overlap": (
        edit_header(lambda h: h[Q].update(data_offsets=h["model.norm.weight"]["data_offsets"])),
        ("model.safetensors", Q),
    ),
    "shape that is not the body's": (
        edit_header(lambda h: h[Q].update(shape=[10**9, 10**9])),
        ("model.safetensors", Q),
    ),
    "unknown dtype": (edit_header(lambda h: h[Q].update(dtype="Q7")), ("model.safetensors", Q, "Q7")),
    "nan": (spoil(float("nan")), (Q, "nan", "finite")),
    "infinity": (spoil(float("-inf")), (Q, "inf", "finite")),
    "nan in the embedding": (
        spoil(float("nan"), "model.embed_tokens.weight"),
        ("model.embed_tokens.weight", "nan"),
    ),
    "nan in the last norm": (spoil(float("nan"), "model.norm.weight"), ("model.norm.weight", "nan")),
    "nan in the head": (spoil(float("nan"), "lm_head.weight"), ("lm_head.weight", "nan")),
    "missing tensor": (edit_tensors(lambda t: t.pop(Q)), (Q, "missing")),
    "extra tensor": (edit_tensors(lambda t: t.update({"spare.weight": torch.ones(2)})), ("spare.weight",)),
    "tensor of another shape": (edit_tensors(lambda t: t.update({Q: torch.ones(64, 60)})), (Q, "60")),
    "no weights": (remove("*.safetensors"), ("no weights", "model.safetensors")),
    "no tokenizer": (remove("tokenizer*"), ("no tokenizer", "copy the tokenizer")),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ("tokenizer",)),  # type: ignore[dict-item]
    "broken config": (lambda f: (f / "config.json").write_text("{"), ("config.json", "JSON")),  # type: ignore[dict-item]
    "no config": (remove("config.json"), ("config.json",)),
    "pickles only": (pickled, ("pytorch_model.bin", "pickle", "safe_serialization=True")),
    "code of its own": (
        edit_json("config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        ("auto_map", "evil.Model", "never executed"),
    ),
    "code for the tokenizer": (
        edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", None]}),
        ("auto_map", "evil.Tok"),
    ),
    "unknown architecture": (edit_json("config.json", model_type="lama"), ("lama", "`llama`")),
    "sequence to sequence": (
        edit_json("config.json", model_type="t5", is_encoder_decoder=True),
        ("t5", "encoder-decoder"),
    ),
    "more blocks than weights": (edit_json("config.json", num_hidden_layers=3), ("model.layers.2",)),
    "other tool's quantization": (
        edit_json("config.json", quantization_config={"quant_method": "bitsandbytes"}),
        ("bitsandbytes", "original model"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_unsafe_model_is_refused(refused: Any, model: Path, tmp_path: Path, damage: str) -> None:
    edit, says = DAMAGES[damage]
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    edit(broken)
    refused(*FIT, source=broken, says=says)


@pytest.mark.parametrize("name", [Q, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_overflow_are_a_damage_of_the_source(
    refused: Any, model: Path, tmp_path: Path, name: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    edit_tensors(lambda tensors: tensors[name].fill_(1e38))(damaged)
    refused(*FIT, source=damaged, says=("overflows float32",))


def test_an_index_that_transformers_cannot_read_is_named(refused: Any, model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    (damaged / "model.safetensors").rename(damaged / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(model / "model.safetensors"), "model-00001-of-00001.safetensors")
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused("generate", "MODEL", "alpha", source=damaged, says=("has no `metadata`",))


@pytest.mark.parametrize("damage", ["nan", "nan in the head"])
def test_compress_finds_what_is_not_a_number_too(
    refused: Any, model: Path, tmp_path: Path, damage: str
) -> None:
    edit, says = DAMAGES[damage]
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    edit(broken)
    refused(*COMPRESS, "--recipe", "rtn:bits=4,group=32", source=broken, says=says)


def test_a_model_with_experts_is_refused_by_the_names_of_its_modules(refused: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **DECODER, **experts))
    made.save_pretrained(tmp_path / "experts")
    byte_tokenizer().save_pretrained(tmp_path / "experts")
    refused(*FIT, source=tmp_path / "experts", says=("mlp.experts", "MixtralExperts", "without experts"))


def test_a_body_that_is_not_what_was_written_is_refused_by_name(
    refused: Any, fitted: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(fitted, changed)
    file = sorted(changed.glob("*.safetensors"))[1]
    change_last_byte(file)
    message = refused(
        "export", "MODEL", "--to", "dense", "-o", "out", source=changed,
        says=(file.name, "was changed after it was written", "SHA-256"),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="was changed after it was written") as caught:
        tailorbird.load(changed, verify=True)
    assert caught.value.given in message


def test_a_compressed_model_is_no_source(refused: Any, fitted: Path) -> None:
    says = ("compressed already", "plan.yaml")
    refused(*FIT, source=fitted, says=says)
    refused(*COMPRESS, "--recipe", "rtn:bits=4,group=32", source=fitted, says=says)


@pytest.mark.parametrize("learns", ["distil", "pv-tuning", "step-sizes", "signround", "efficientqat"])
def test_gradients_through_the_codes_of_a_source_are_refused_by_name(
    refused: Any, model: Path, fitted: Path, tmp_path: Path, learns: str
) -> None:
    says = ("compressed already", f"`{learns}` can't learn by gradients through its codes")
    recipe = f"gptq+{learns}:bits=4,group=32"
    refused(*COMPRESS, "--recipe", recipe, source=fitted, says=says)
    refused(*FIT, "--method", f"gptq+{learns}", source=fitted, says=says)
    foreign = tmp_path / "foreign"
    shutil.copytree(model, foreign)
    edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4})(foreign)
    refused(*COMPRESS, "--recipe", recipe, source=foreign, says=("already quantized by 'gptq'",))


def test_only_what_tailorbird_made_is_exported(refused: Any, model: Path) -> None:
    refused(*LEAST["export"], source=model, says=(str(model),))


# --- the text ------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[str, bytes | None, tuple[str, ...]]] = {
    "missing": ("none.txt", None, ("none.txt", "check the path")),
    "empty": ("empty.txt", b"", ("empty.txt is empty", "another file")),
    "blank": ("blank.txt", b" \n\n\t ", ("blank.txt",)),
    "unknown kind": ("song.mp3", b"la la", ("song.mp3", ".jsonl", "give another file")),
    "binary": ("noise.txt", bytes(range(256)) * 8, ("noise.txt", "UTF-8")),
    "not json": ("bad.jsonl", b'{"text": "a"}\n{"text', ("bad.jsonl", "line 2", "not JSON")),
    "no text in it": ("keys.jsonl", b'{"body": "a"}', ("keys.jsonl", "`body`", "`text` or `messages`")),
    "not parquet": ("bad.parquet", b"PAR0", ("bad.parquet", "arquet")),
    "conversations without a template": (
        "talk.jsonl",
        b'{"messages": [{"role": "user", "content": "hello"}]}',
        ("talk.jsonl", "chat template"),
    ),
    "nothing to set aside": ("one.jsonl", b'{"text": "alpha beta gamma"}', ("set aside", "--evaluation")),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_cannot_be_used(refused: Any, tmp_path: Path, case: str) -> None:
    name, content, says = TEXTS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(*FIT, "--calibration", str(tmp_path / name), says=says)


def test_a_directory_without_text(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    refused(*FIT, "--calibration", str(tmp_path / "pictures"), says=("pictures", "holds no text"))


def test_text_that_may_not_be_read(refused: Any, tmp_path: Path) -> None:
    locked = write_text(tmp_path / "locked.jsonl")
    locked.chmod(0)
    if os.access(locked, os.R_OK):
        pytest.skip("this user (root) may read every file")
    refused(*FIT, "--calibration", str(locked), says=("locked.jsonl", "ermission"))


@pytest.mark.parametrize("which", ["--calibration", "--evaluation"])
def test_text_that_is_one_token_throughout(refused: Any, tmp_path: Path, text: Path, which: str) -> None:
    flat = tmp_path / "flat.txt"
    flat.write_text("a" * 4000)
    other = {"--calibration": "--evaluation", "--evaluation": "--calibration"}[which]
    refused(*FIT, which, str(flat), other, str(text), says=("flat.txt", "the one token", "tokenizer"))


def test_the_same_document_on_both_sides(refused: Any, text: Path) -> None:
    refused(*FIT, "--evaluation", str(text), says=("held-out document", "remove it"))


# --- budgets and settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", ["lots", "", "-1", "0", "0%", "12 parsecs", "1.5G", "1e9", "nan%", "0.1", "9" * 50]
)
def test_nonsense_sizes(refused: Any, size: str) -> None:
    refused(*FIT, f"--memory={size}", says=(f"`{size[:40]}", "1.5GiB"))


@pytest.mark.parametrize("size", ["100%", "16bpw", "400GiB"])
def test_a_budget_that_the_model_meets_already(refused: Any, size: str) -> None:
    refused(*FIT, "--memory", size, says=("16 bits", "the model already fits"))


def test_a_budget_below_the_smallest_plan_names_one_that_works(
    refused: Any, command: Any, model: Path, text: Path
) -> None:
    message = refused(*FIT, "--memory", "1%", says=("at least", "smallest possible plan"))
    smallest = int(re.search(r"at least (\d+) bytes", message)[1])  # type: ignore[index]
    advised = re.search(r"give --memory (\S+) or more", message)[1]  # type: ignore[index]
    refused(*FIT, "--memory", str(smallest - 1), says=("smallest possible plan",))
    assert command(*filled((*FIT, "--memory", advised, "--dry-run"), model, text)).status == 0
    result = tailorbird.fit(
        str(model), str(smallest), "fits", calibration=str(text), sequences=4, length=32, measure_speed=False
    )
    assert result.total_bytes == smallest


def test_a_cache_that_leaves_no_room(refused: Any) -> None:
    says = ("KV cache", "--context 128", "--concurrency 64")
    refused(*FIT, "--context", "128", "--concurrency", "64", says=says)


SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "long windows": ((*FIT, "--length", "4096"), ("4096 tokens", "1 to 128", "--length")),
    "long context": ((*FIT, "--context", "4096"), ("4096 tokens", "1 to 128", "--context")),
    "long windows to compress": (
        (*COMPRESS, "--recipe", "rtn:bits=4", "--length", "129"),
        ("129 tokens", "1 to 128", "--length"),
    ),
    "long windows to evaluate": (
        ("evaluate", "MODEL", "--text", "TEXT", "--context", "4096"),
        ("4096", "128"),
    ),
    "method": ((*FIT, "--method", "gpqt"), ("gpqt", "did you mean `gptq`")),
    "fold": ((*FIT, "--method", "awk+gptq"), ("awk", "`awq`")),
    "target": ((*FIT, "--target", "guff"), ("guff", "did you mean `gguf`")),
    "activations": ((*FIT, "--activations", "exakt"), ("exakt", "did you mean `exact`")),
    "method of a recipe": ((*COMPRESS, "--recipe", "rtm:bits=4"), ("rtm", "did you mean `rtn`")),
    "setting of a recipe": (
        (*COMPRESS, "--recipe", "gptq:bits=4,dampening=0.1"),
        ("dampening", "did you mean `damping`"),
    ),
    "group of a recipe": ((*COMPRESS, "--recipe", "gptq:bits=4,grup=64"), ("grup", "did you mean `group`")),
    "setting twice": (
        (*COMPRESS, "--recipe", "gptq:bits=4,group=64,bits=3"),
        ("`bits` twice", "each setting once"),
    ),
    "setting twice by both of its names": (
        (*COMPRESS, "--recipe", "gptq:bits=4,group=64,group_size=32"),
        ("`group_size` twice", "each setting once"),
    ),
    "setting without a value": ((*COMPRESS, "--recipe", "gptq:bits=,group=64"), ("`bits=`", "name=value")),
    "prompt": (("generate", "MODEL", "caf\udce9"), ("aren't UTF-8, at character 4",)),
    "prompt of a stream": (("generate", "MODEL", "caf\udce9", "--stream"), ("aren't UTF-8",)),
    "value of a setting": ((*COMPRESS, "--recipe", "gptq:bits=4,damping=wet"), ("damping", "wet", "0.01")),
    "bits": ((*COMPRESS, "--recipe", "rtn:bits=7"), ("7", "2, 3, 4, 5, 6, 8")),
    "bits of a method": (
        (*COMPRESS, "--recipe", "double-rounding:bits=4"),
        ("int4 g64 sym", "8 bits without zero points"),
    ),
    "bits of a dense model": (
        ("evaluate", "MODEL", "--text", "TEXT", "--bits", "4"),
        ("aren't stored as codes", "double-rounding"),
    ),
    "bits that aren't nested": (("generate", "MODEL", "a", "--bits", "5"), ("5 bits", "8, 6, 4, 2")),
    "codebook": ((*COMPRESS, "--recipe", "rtn:codebook=nf5"), ("codebook 'nf5'", "nf4")),
    "no bits": ((*COMPRESS, "--recipe", "gptq"), ("no bits", "gptq:bits=4,group=64")),
    "group": ((*COMPRESS, "--recipe", "rtn:bits=4,group=7"), ("group_size", "7")),
    "recipe that is not there": ((*COMPRESS, "--recipe", "none.yaml"), ("none.yaml", "check the path")),
    "plan that is not there": ((*COMPRESS, "--plan", "none.yaml"), ("none.yaml",)),
    "neither recipe nor plan": (COMPRESS, ("neither", "exactly one of --recipe and --plan")),
    "recipe and plan": (
        (*COMPRESS, "--recipe", "rtn:bits=4", "--plan", "plan.yaml"),
        ("a recipe and a plan", "exactly one"),
    ),
    "allocator": ((*FIT, "--allocator", "rankin"), ("`rankin`", "did you mean `ranking`")),
    "concurrency alone": ((*FIT, "--concurrency", "4"), ("--concurrency 4", "add --context")),
    "nothing to resume": ((*FIT, "--resume"), ("nothing to resume", "without --resume")),
    "no output": (("fit", "MODEL", "--memory", "45%", "--calibration", "TEXT"), ("--output", "add -o OUT")),
    "export to what": (("export", "MODEL", "--to", "gguff", "-o", "out"), ("gguff", "did you mean `gguf`")),
    "stream of json": (("generate", "MODEL", "a", "--stream", "--json"), ("--stream", "--json")),
    "family": (("methods", "--family", "quantise"), ("quantise", "`quantize`")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_unknown_or_in_conflict(refused: Any, case: str) -> None:
    arguments, says = SETTINGS[case]
    refused(*arguments, says=says)


USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown flag": ((*FIT, "--memroy", "45%"), ("--memroy", "--memory")),
    "no budget": (("fit", "MODEL", "-o", "out"), ("--memory",)),
    "no model": (("fit", "--memory", "45%", "-o", "out"), ("MODEL",)),
    "no windows": ((*FIT, "--sequences", "0"), ("--sequences", "greater than or equal to 1")),
    "one token": ((*FIT, "--length", "1"), ("--length", "greater than or equal to 2")),
    "no context": ((*FIT, "--context", "0"), ("--context", "greater than or equal to 1")),
    "no concurrency": ((*FIT, "--concurrency", "0"), ("--concurrency", "greater than or equal to 1")),
    "a word for a number": ((*FIT, "--max-kl", "little"), ("--max-kl", "valid number")),
    "a seed that no plan holds": ((*FIT, "--seed", str(1 << 63)), ("--seed", "less than or equal to")),
    "a negative divergence": ((*FIT, "--max-kl", "-1"), ("--max-kl", "greater than or equal to 0")),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_command_line_that_cannot_be_read(refused: Any, case: str) -> None:
    arguments, says = USAGE[case]
    refused(*arguments, says=says, usage=True)


@pytest.mark.parametrize(
    ("gate", "value"),
    [("--max-kl", "inf"), ("--max-perplexity-increase", "nan"), ("--max-perplexity-increase", "-inf")],
)
def test_a_gate_that_could_never_refuse(refused: Any, gate: str, value: str) -> None:
    refused(*FIT, gate, value, says=(gate, value))


@pytest.mark.parametrize("name", LEAST)
def test_a_device_other_than_the_processor(refused: Any, name: str) -> None:
    refused(*LEAST[name], "--device", "cuda", says=("cuda", "--device cpu"))


# --- too little text to tell ---------------------------------------------------------------------

FEW = ("--allow-slower", "--sequences", "1", "--recipe", "gptq:bits=8,group=32")


def warnings_of(output: Path) -> list[str]:
    found: list[str] = json.loads((output / "report.json").read_text())["result"]["warnings"]
    return found


@pytest.mark.parametrize("sequences", [4, 5])
def test_fewer_tokens_than_a_linear_has_inputs_are_said_before_work_and_in_the_result(
    command: Any, model: Path, text: Path, tmp_path: Path, sequences: int
) -> None:
    arguments = filled((*COMPRESS, *FEW, "--sequences", str(sequences)), model, text)
    done = command(*arguments, "-o", str(tmp_path / "out"))
    assert done.status == 0, done.err
    tokens, needed = sequences * 32, DECODER["intermediate_size"]
    said = f"calibration text has {tokens} tokens, and the Gram matrix of the {needed} inputs of "
    few = [warning for warning in warnings_of(tmp_path / "out") if warning.startswith(said)]
    assert len(few) == (tokens < needed)
    assert (said in done.err) == (tokens < needed)
    if few:
        assert done.err.index(said) < done.err.index("statistics …")
        assert f"needs {needed} at least: damping holds the rest, 0.01 of" in few[0]
        assert "mlp.down_proj" in few[0]


@pytest.mark.parametrize("recipe", ["rtn:bits=8,group=32", "llm-int8:bits=8,group=32"])
def test_methods_that_divide_by_no_gram_matrix_ask_for_no_more_text(
    model: Path, text: Path, tmp_path: Path, recipe: str
) -> None:
    result = tailorbird.compress(
        str(model), tmp_path / "out", recipe=recipe, calibration=str(text), sequences=1, length=32,
        measure_speed=False, measure_spread=False,
    )  # fmt: skip
    assert not any("Gram matrix" in warning for warning in result.warnings)


def test_a_comparison_says_of_few_tokens_too(command: Any, model: Path, text: Path, tmp_path: Path) -> None:
    few = ("--calibration", "TEXT", "--sequences", "2", "--length", "32")
    line = filled(("compare", "MODEL", "--budgets", "45%", "--methods", "rtn,gptq", *few), model, text)
    done = command(*line, "-o", str(tmp_path / "table"))
    assert done.status == 0, done.err
    assert done.err.count("calibration text has 64 tokens") == 1
    said = json.loads((tmp_path / "table" / "comparison.json").read_text())["warnings"]
    assert any("calibration text has 64 tokens" in warning for warning in said)


def test_a_damping_that_had_to_be_raised_is_said_with_its_linear(
    command: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    recipe = "gptq:bits=8,group=32,damping=1e-9"
    arguments = filled((*COMPRESS, *FEW, "--recipe", recipe), model, text)
    done = command(*arguments, "-o", str(tmp_path / "out"))
    assert done.status == 0, done.err
    places = json.loads((tmp_path / "out" / "report.json").read_text())["plan"]["places"]
    used = {place["name"]: place["measured"].get("damping") for place in places if place["measured"]}
    raised = {name: damping for name, damping in used.items() if damping is not None}
    assert raised
    assert all(1e-9 < damping <= 1e-3 for damping in raised.values())
    (said,) = (warning for warning in warnings_of(tmp_path / "out") if "damping was raised" in warning)
    name, damping = next(iter(raised.items()))
    assert f"{damping:g} at `{name}`" in said
    assert said in done.err


# --- plans ---------------------------------------------------------------------------------------

PLANS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown place": (
        "schema: 1\nplaces:\n"
        "- {name: model.layers.0.self_attn.q_prog, coding: {kind: integer, bits: 4, group_size: 32}}\n",
        ("q_prog", "did you mean", "model.layers.0.self_attn.q_proj"),
    ),
    "unknown field": ("schema: 1\nplacs: []\n", ("placs", "places")),
    "unknown coding": (
        "schema: 1\nplaces:\n- {name: lm_head, coding: {kind: integer, bits: 9, group_size: 32}}\n",
        ("9", "places"),
    ),
    "unknown codebook": (
        "schema: 1\nplaces:\n- {name: lm_head, coding: {kind: codebook, codebook: nf3, group_size: 32}}\n",
        ("nf3", "nf4", "places"),
    ),
    "code": ("!!python/object/apply:os.mkdir ['made-by-the-plan']\n", ("plan.yaml",)),
    "code in a field": (
        "schema: 1\nplaces: !!python/object/apply:os.mkdir ['made-by-the-plan']\n",
        ("plan.yaml",),
    ),
    "no yaml": ("{{{\n", ("plan.yaml is not YAML", "line 2, column 1", "bracket")),
    "empty": ("", ("plan.yaml",)),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_cannot_be_followed(refused: Any, tmp_path: Path, case: str) -> None:
    content, says = PLANS[case]
    (tmp_path / "plan.yaml").write_text(content)
    refused(*COMPRESS, "--plan", str(tmp_path / "plan.yaml"), says=says)


@pytest.mark.parametrize(
    "content", ["!!python/object/apply:os.mkdir ['made-by-the-recipe']", "{{{", "", "[1]"]
)
def test_recipes_that_cannot_be_followed(refused: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    refused(*COMPRESS, "--recipe", str(tmp_path / "recipe.yaml"), says=("recipe.yaml",))


# --- where the result goes -----------------------------------------------------------------------

RECIPE = ("--recipe", "rtn:bits=4,group=32")
WRITERS = {
    "fit": FIT,
    "compress": (*COMPRESS, *RECIPE),
    "export": ("export", "MODEL", "--to", "dense", "-o", "out"),
}
COMPARE = ("compare", "MODEL", "--budgets", "45%", "--methods", "rtn", "-o", "out")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_an_output_that_exists(refused: Any, fitted: Path, model: Path, name: str, kind: str) -> None:
    out = Path("out")
    if kind == "directory":
        out.mkdir()
        (out / "precious").write_text("data")
    elif kind == "file":
        out.write_text("data")
    else:
        out.symlink_to("nowhere")
    source = fitted if name == "export" else model
    refused(*WRITERS[name], source=source, says=("out exists already", "choose another --output"))


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_below_a_file(refused: Any, fitted: Path, model: Path, name: str) -> None:
    Path("file").write_text("data")
    source = fitted if name == "export" else model
    refused(*WRITERS[name], "-o", "file/out", source=source, says=("file can't be written to", "--output"))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("length", [300, 250])
def test_an_output_whose_name_is_too_long(
    refused: Any, fitted: Path, model: Path, name: str, length: int
) -> None:
    source = fitted if name == "export" else model
    refused(*WRITERS[name], "-o", "o" * length, source=source, says=("o" * length, "too long", "--output"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc")
@pytest.mark.parametrize("name", WRITERS)
def test_an_output_where_nobody_may_write(refused: Any, fitted: Path, model: Path, name: str) -> None:
    source = fitted if name == "export" else model
    refused(*WRITERS[name], "-o", "/proc/out", source=source, says=("/proc", "--output"))


@pytest.mark.parametrize("name", WRITERS)
def test_an_output_in_a_read_only_directory(refused: Any, fitted: Path, model: Path, name: str) -> None:
    Path("locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):
        pytest.skip("this user (root) may write into every directory")
    source = fitted if name == "export" else model
    refused(
        *WRITERS[name], "-o", "locked/out", source=source, says=("locked can't be written to", "--output")
    )


@pytest.mark.parametrize("name", ["fit", "compress"])
def test_a_disk_without_room(refused: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refused(*WRITERS[name], says=("of disk", "1000 bytes are free", "larger disk"))


@pytest.mark.parametrize("name", ["fit", "compress"])
def test_a_cache_that_cannot_be_written(
    refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").write_text("data")
    monkeypatch.setenv("TAILORBIRD_CACHE", str(tmp_path / "file" / "cache"))
    refused(*WRITERS[name], says=("file/cache can't be written", "set TAILORBIRD_CACHE"))


@pytest.mark.parametrize("name", WRITERS)
def test_directories_on_the_way_to_the_output_are_not_left_behind(
    refused: Any, model: Path, fitted: Path, tmp_path: Path, name: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(fitted if name == "export" else model, broken)
    if name == "export":
        change_last_byte(sorted(broken.glob("*.safetensors"))[0])
    else:
        spoil(float("nan"))(broken)
    refused(*WRITERS[name], "-o", "new/folder/out", source=broken, says=(".safetensors: ",))


@pytest.mark.parametrize("path", ["o" * 300, "file/out"])
def test_a_comparison_whose_directory_cannot_be_made(refused: Any, path: str) -> None:
    Path("file").write_text("data")
    refused(*COMPARE, "--calibration", "TEXT", "-o", path, says=("can't be made", "choose another --output"))


def test_a_comparison_without_text_leaves_no_directory(refused: Any) -> None:
    refused(*COMPARE, "--calibration", "nowhere", "-o", "new/table", says=("text nowhere does not exist",))


def test_unfinished_work_of_another_kind_is_left_alone(refused: Any) -> None:
    Path("out.partial").mkdir()
    (Path("out.partial") / "notes.txt").write_text("mine")
    refused(*FIT, says=("out.partial", "no record", "remove it or choose another --output"))


# --- tuning --------------------------------------------------------------------------------------

GOOD = (
    b'{"prompt": "one plus one is ", "completion": "two"}\n'
    b'{"prompt": "two plus two is ", "completion": "four"}\n'
)
EXAMPLES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "broken line": (GOOD + b'{"prompt": "three', ("data.jsonl, line 3", "not JSON", "correct or remove it")),
    "no fields that are known": (GOOD + b'{"question": "three"}', ("data.jsonl, line 3", "question")),
    "a number for a text": (GOOD + b'{"prompt": 3, "completion": "four"}', ("data.jsonl, line 3", "prompt")),
    "two kinds": (GOOD + b'{"text": "three"}', ("data.jsonl, line 3", "one kind in all of the data")),
    "no UTF-8": (GOOD + b'{"prompt": "\xff", "completion": "x"}', ("data.jsonl, line 3", "UTF-8")),
    "empty": (b"", ("data.jsonl is empty", "some examples")),
    "blank": (b"\n \n", ("data.jsonl is empty",)),
    "one example alone": (GOOD.splitlines()[0], ("nothing that could be held out", "--validation")),
    "conversation without a template": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        ("data.jsonl, line 1", "no chat template", "--chat-template"),
    ),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_examples_that_cannot_be_learned(refused: Any, tmp_path: Path, case: str) -> None:
    content, says = EXAMPLES[case]
    (tmp_path / "data.jsonl").write_bytes(content)
    refused(*TUNE, "--data", str(tmp_path / "data.jsonl"), says=says)


LEARNED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "method": (("--method", "loro"), ("loro", "did you mean `lora`")),
    "setting": (("--set", "rang=3"), ("`rang`", "did you mean `rank`")),
    "value of a setting": (("--set", "rank=high"), ("rank 'high' of lora", "whole number")),
    "target": (("--targets", "q_prj"), ("`q_prj`", "did you mean `q_proj`", "down_proj")),
    "rank": (
        ("--set", "rank=65"),
        ("rank 65 of lora for `model.layers.0.self_attn.q_proj`", "at most 64", "lower the rank"),
    ),
    "optimizer": (("--optimizer", "adamv"), ("adamv", "did you mean `adamw`")),
    "memory": (("--memory", "1MiB"), ("1.00 MiB of memory, but tuning takes", "set --memory higher")),
    "length": (("--length", "4096"), ("4096 tokens", "context of 128", "--length")),
    "template": (("--chat-template", "none.jinja"), ("none.jinja", "check the path")),
    "data": (("--data", "nowhere.jsonl"), ("nowhere.jsonl does not exist", "check the path")),
    "held-out data": (("--validation", "nowhere.jsonl"), ("nowhere.jsonl does not exist",)),
    "nothing to resume": (("--resume",), ("nothing to resume", "without --resume")),
}


@pytest.mark.parametrize("case", LEARNED)
def test_a_tuning_that_cannot_be(refused: Any, case: str) -> None:
    arguments, says = LEARNED[case]
    refused(*TUNE, *arguments, says=says)


@pytest.fixture(scope="module")
def elsewhere(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of another model."""
    folder = tmp_path_factory.mktemp("elsewhere")
    other = save_model(folder / "model", "llama", seed=5, intermediate_size=96)
    tailorbird.tune(str(other), str(text), folder / "adapter", steps=1, batch=1)
    return folder / "adapter"


def test_an_adapter_of_another_base_is_none_to_learn_from(refused: Any, elsewhere: Path) -> None:
    settings = ("--set", f'adapters=["{elsewhere}"]', "--set", "components=2")
    refused(*TUNE, "--method", "eigenlorax", *settings, says=("96 features", "160", "adapters of this model"))


def test_an_adapter_of_another_base_is_not_merged(refused: Any, elsewhere: Path) -> None:
    says = (str(elsewhere), "on which it was tuned")
    refused("adapters", "merge", "MODEL", str(elsewhere), "-o", "out", "--data", "TEXT", says=says)


class Interrupting(Silent):
    """Asks the tuning to stop once a step is done."""

    def advance(self, n: int = 1, note: str = "") -> None:
        if note.startswith("loss"):
            signal.raise_signal(signal.SIGINT)


def test_unfinished_tuning_goes_on_with_the_same_settings_alone(
    command: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tailorbird.tune(
            str(model), str(text), "out", steps=4, batch=1, save_every=1, progress=Interrupting()
        )  # fmt: skip
    states = Path("out.partial/.job/states")
    before = tree(states)
    assert before
    done = command(*filled((*TUNE, "--rate", "0.01", "--set", "rank=2"), model, text))
    assert (done.status, done.out) == (2, "")
    for words in ("settings.rate: null -> 0.01", "settings.method_settings.rank: null -> 2", "what to do: "):
        assert words in done.err
    assert tree(states) == before
    assert command(*filled((*TUNE, "--resume"), model, text)).status == 0


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("there", ("there exists already", "choose another --output")),
        ("there/precious/out", ("precious can't be written to", "--output")),
        ("o" * 300, ("too long", "--output")),
    ],
)
def test_a_tuning_whose_output_cannot_be(refused: Any, output: str, says: tuple[str, ...]) -> None:
    Path("there").mkdir()
    (Path("there") / "precious").write_text("data")
    refused(*TUNE, "-o", output, says=says)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes are Linux's")
def test_a_state_for_which_there_is_no_room_leaves_the_one_before(
    command: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    """The limit of files' sizes is set under a running tuning, as a disk fills up under it."""
    arguments = [*filled(TUNE, model, text), "--steps", "60"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "NO_COLOR": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "tailorbird", *arguments, "-o", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    states, end = tmp_path / "out.partial" / ".job" / "states", time.monotonic() + 60
    try:
        while not (states / "step-000000003").exists() and child.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.001)
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1000, 1000))
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 2, said
    for words in ("state.safetensors cannot be written", "File too large", "ulimit -f"):
        assert words in said
    kept = sorted(path.name for path in states.iterdir())
    assert len(kept) == 2
    assert all(re.fullmatch(r"step-0{6}\d{3}", name) for name in kept)
    assert kept[0] >= "step-000000002"
    assert not out.exists()
    for target in (out, whole):
        assert command(*arguments, "-o", str(target)).status == 0
    assert (out / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()
