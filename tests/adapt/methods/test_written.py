"""What methods write as a LoRA: plain PEFT computes the same logits with it, and what vLLM asks for holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tuned
from compressed import INT4, save_compressed
from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.peft.pissa import Pissa
from tailorbird.adapt.methods.registry import METHODS
from tailorbird.adapt.places import places_of
from tailorbird.adapt.save import write_adapter
from tailorbird.adapt.wrap import attached as in_place
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tiny import make_model, save_model

peft = pytest.importorskip("peft")

#: methods of which PEFT's LoRA can't hold what they learn, and why
OTHERS = {
    "glora": "the change isn't of low rank, and may reach a bias; PEFT's GLoRA, tested in test_glora.py",
    "mixlora": "the input chooses the experts",
    "goat": "the input chooses the experts",
}
WRITTEN = [name for name in METHODS if name not in OTHERS]
#: those whose linears may end with ranks of their own
MOVING = ("elalora", "triadaptlora")
#: the highest of `--max-lora-rank` (vllm/config/lora.py)
MOST_RANK = 512
BASES = ("llama", "gpt2", "packed")
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Anatomy]]:
    folder = tmp_path_factory.mktemp("bases")
    save_model(folder / "llama")
    save_model(folder / "gpt2", "gpt2")
    save_compressed(folder / "packed", make_model("llama"), INT4)
    return {
        name: (load(str(folder / name)), read_anatomy(open_checkpoint(str(folder / name)))) for name in BASES
    }


def put(bases: Mapping[str, Any], base: str, name: str) -> tuple[Any, dict[str, Place], Attached]:
    """A copy of a model, and a method on it that isn't nothing any more."""
    model = copy.deepcopy(bases[base][0]).requires_grad_(False)
    places = places_of(model, bases[base][1])
    given = {"adapters": tuned.existing_adapters(places)} if name == "eigenlorax" else {}
    return model, places, tuned.shaken(tuned.attach(tuned.small(name, **given), places), 0.1)


def logits(model: Any, places: Mapping[str, Place], method: Attached) -> Tensor:
    with in_place(model, places, method), torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def written(directory: Path, places: Mapping[str, Place], method: Attached) -> dict[str, Any]:
    """The config of what `tune` would write."""
    write_adapter(directory, places, method, list(places), "base", {})
    found: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return found


def refusals(directory: Path, most_rank: int = MOST_RANK) -> set[str]:
    """Keys of a directory with which vLLM doesn't load it, or of which it knows nothing.

    By vllm/lora/peft_helper.py, and by the names of tensors that vllm/lora/lora_model.py reads.
    """
    config = json.loads((directory / "adapter_config.json").read_text())
    holds = {
        "peft_type": config["peft_type"] == "LORA",
        "r": isinstance(config.get("r"), int) and 1 <= config["r"] <= most_rank,
        "lora_alpha": isinstance(config.get("lora_alpha"), int),
        "target_modules": isinstance(config.get("target_modules"), list),
        "bias": config.get("bias", "none") == "none",
        "modules_to_save": not config.get("modules_to_save"),
        "use_dora": not config.get("use_dora"),
        "rank_pattern": not config.get("rank_pattern"),
        "alpha_pattern": not config.get("alpha_pattern"),
    }
    for key, tensor in load_file(directory / "adapter_model.safetensors").items():
        path, _, end = key.rpartition(".lora_")
        holds[key] = path.startswith("base_model.model.") and end in ("A.weight", "B.weight")
        if not config.get("rank_pattern"):
            holds[f"rank of {key}"] = tensor.shape[0 if end == "A.weight" else 1] == config.get("r")
    return {key for key, one in holds.items() if not one}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", WRITTEN)
def test_plain_peft_computes_the_same_with_it(
    name: str, base: str, bases: dict[str, Any], tmp_path: Path
) -> None:
    model, places, method = put(bases, base, name)
    expected = logits(model, places, method)
    plain = logits(model, places, Attached())
    assert (expected - plain).norm() > 0.01 * plain.norm()
    config = written(tmp_path, places, method)
    assert config["peft_type"] == "LORA"
    made = peft.PeftModel.from_pretrained(copy.deepcopy(bases[base][0]), tmp_path).eval()
    with torch.no_grad():
        found = made(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert refusals(tmp_path) == set()


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_lora_doesnt_say_it_were_one(name: str, bases: dict[str, Any], tmp_path: Path) -> None:
    _, places, method = put(bases, "llama", name)
    assert written(tmp_path, places, method)["peft_type"] != "LORA"


@pytest.mark.parametrize("name", MOVING)
def test_ranks_that_moved_are_told_to_peft_and_not_to_vllm(
    name: str, bases: dict[str, Any], tmp_path: Path
) -> None:
    model, places, method = put(bases, "llama", name)
    tuned.steps(method, tuned.regression(method, places), last=12, total=12)
    config = written(tmp_path, places, method)
    assert config["rank_pattern"] == config["alpha_pattern"]
    made = peft.PeftModel.from_pretrained(copy.deepcopy(bases["llama"][0]), tmp_path).eval().double()
    with torch.no_grad():
        found = made(input_ids=IDS, use_cache=False).logits
    # changes are larger than weights here, and a float's rounding shows
    expected = logits(model.double(), places, method.double())
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert refusals(tmp_path) == {"rank_pattern", "alpha_pattern"}


def ranks_at_defaults() -> dict[str, int]:
    """What each method writes for a large linear where nothing is set."""
    torch.manual_seed(0)
    place = Place("model.layers.0.mlp.down_proj", "down", 0, 640, 640, nn.Linear(640, 640, bias=False))
    found = {}
    for name in WRITTEN:
        if name == "eigenlorax":  # as the adapters that it is given
            continue
        addition = METHODS[name]().attach({place.path: place}, torch.Generator()).addition(place.path)
        assert addition is not None
        found[name] = len(addition.factors()[1])
    return found


def test_the_ranks_that_vllm_has_to_allow_are_as_documented() -> None:
    ranks = ranks_at_defaults()
    assert {name for name, rank in ranks.items() if rank > MOST_RANK} == {"loca"}
    text = (Path(__file__).parents[3] / "docs" / "tuning.md").read_text(encoding="utf-8")
    section = text.split("## What is written")[1].split("\n## ")[0]
    for name, rank in ranks.items():
        if rank > 16:  # vLLM's own default
            assert f"`{name}` {rank:,}" in section, (name, rank)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 1024}, "r"),
        ({"lora_alpha": 1.5}, "lora_alpha"),
        ({"peft_type": "VERA"}, "peft_type"),
    ],
)
def test_the_conditions_tell_what_breaks_them(
    changed: dict[str, Any], named: str, bases: dict[str, Any], tmp_path: Path
) -> None:
    _, places, method = put(bases, "llama", "lora")
    config = written(tmp_path, places, method)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed))
    assert named in refusals(tmp_path)


def test_pissa_has_twice_its_rank_there(bases: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(bases["llama"][0]).requires_grad_(False)
    places = places_of(model, bases["llama"][1])
    method = tuned.shaken(Pissa(rank=4).attach(places, torch.Generator()), 0.1)
    assert written(tmp_path, places, method)["r"] == 8
    assert refusals(tmp_path) == set()
