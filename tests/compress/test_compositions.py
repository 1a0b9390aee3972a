"""Methods of all stages, and allocators over them, run together or are refused before work.

Recipes are drawn at random, with codings and small settings, or with an allocator and a budget. One that is
refused must say why, of something that was drawn, and leave nothing on disk; one that runs must give a model
that loads, and that stands far nearer to its source than a stranger does.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tailorbird import api
from tailorbird.compress import allocation, effort
from tailorbird.compress.recipe import STAGES, Recipe, parse_recipe, planned_recipe
from tailorbird.errors import GateRefused, UserError
from tailorbird.formats.codebooks import POINTS, bits_of
from tailorbird.model.load import load
from tailorbird.plan.allocators import ALLOCATORS
from tailorbird.plan.allocators.evopress import Evopress
from tailorbird.plan.planfile import load_plan
from tiny import make_model, save_model

#: recipes that are drawn, and those of them in a quick run
RECIPES, QUICK = 200, 16
#: budgets that are drawn, the first of which nothing meets
BUDGETS = ("2%", "22%", "25%", "30%", "45%", "70%", "3bpw", "4.5bpw", "6bpw")
#: widths that leave the last group of a row short; logits that are far from equal
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
        "max_position_embeddings": 32,
    },
    "gpt2": {"n_embd": 48, "n_layer": 1, "n_positions": 32, "initializer_range": 0.1},  # tied, and [in, out]
}
#: settings by method that are small, at an edge, or beyond it
SETTINGS: dict[str, dict[str, list[Any]]] = {
    "rtn": {"clip_search": ["true", "false"]},
    "gptq": {
        "act_order": ["true", "false"],
        "static_groups": ["true", "false", "false"],
        "asymmetric": ["true", "false"],
        "residual": ["whole", "column"],
        "block_size": [1, 7, 128],
        "damping": [0.01, 1.0, 0.0],
        "least_token": [0.01, 1.0],
    },
    "yaqa": {"asymmetric": ["true", "false"], "clip_search": ["true", "false"], "least_token": [0.01, 0.0]},
    "spqr": {"outliers": [0.005, 0.02, 0.5], "rounds": [1, 4]},
    "llm-int8": {"outliers": [0.0, 0.03, 0.5]},
    "quantease": {
        "sweeps": [1, 2], "start": ["gptq", "rtn"], "least_token": [0.01, 1.0], "outliers": [0.0, 0.01],
    },
    "ganq": {"rounds": [1, 2], "damping": [0.01, 1.0], "asymmetric": ["true", "false"]},
    "bcq": {"rounds": [0, 1, 2, -1], "damping": [0.01, 1.0]},
    "billm": {"static_groups": ["true", "false"], "asymmetric": ["true", "false"], "damping": [0.01, 0.0]},
    "hadamard": {"seed": [0, 7]},
    "higgs": {"block": [1, 16, 1024], "seed": [0, 7], "feedback": ["true", "false"]},
    "df11": {},
    "leanquant": {"exponent": [0.0, 1.0, 4.0], "asymmetric": ["true", "false"]},
    "double-rounding": {"balance": [0.0, 0.5, 1.0, 2.0], "asymmetric": ["true", "false"]},
    "decoupleq": {"rounds": [1, 0], "clip_search": ["true", "false"]},
    "smoothing": {"alpha": [0.3, 1.0, 1.5]},
    "fptq": {},
    "cfp": {"alpha": [0.5, 1.0]},
    "outliertune": {},
    "awq": {"grid": [1, 4], "clip_search": ["true", "false"]},
    "eora": {"rank": [1, 8, 48, 1000], "dtype": ["bfloat16", "float16", "int8"]},
    "lq-lora": {"rank": [1, 8, 48, 1000], "dtype": ["bfloat16", "float16"], "iterations": [1, 2, 0]},
    **{
        name: {"steps": [1, 3], "batch": [1, 4, 64]}
        for stage in ("block", "whole")
        for name in STAGES[stage]
    },
    "cbq": {"steps": [1, 3], "batch": [1, 4, 64], "window": [2, 3], "overlap": [0, 1], "rank": [1, 5]},
    "flatquant": {"steps": [1, 3], "batch": [1, 4, 64], "rate": [0.005, 0.0]},
    "omniquant": {"steps": [1, 3], "batch": [1, 4, 64], "transform": ["true", "false", "false"]},
}  # fmt: skip
#: how often a method gets tables; others hardly ever
TABLES = {"ganq": 0.8, "bcq": 0.8, "leanquant": 0.3, "rtn": 0.2}
#: how often a method gets signs before two magnitudes
SIGNS = {"billm": 0.8, "rtn": 0.1}
#: what is drawn of codebooks where most are; others seldom get one
CODEBOOKS = {"higgs": ["gauss2", "gauss3", "gauss4", "gauss2x2", "gauss2x4", "gauss3x2"]}
#: what is drawn of bits; others take any
BITS = {"double-rounding": [8, 8, 8, 8, 4]}
#: bits -> the most of a stranger's divergence that a result may have
SHARE = {2: 1.0, 3: 0.5, 4: 0.2, 5: 0.1, 6: 0.05, 8: 0.02}


def planned(seed: int) -> bool:
    """Whether an allocator and a budget are drawn beside methods, and not a coding and settings."""
    return seed % 3 == 0 if seed < QUICK else seed % 7 == 2


def methods_drawn(draw: random.Random, rotated: float = 0.27) -> dict[str, str]:
    """Stage -> method, some of which go with nothing."""
    return {
        stage: draw.choice(sorted(known))
        for stage, known in STAGES.items()
        if stage == "method" or draw.random() < (rotated if stage == "rotation" else 0.27)
    }


def drawn_plan(seed: int) -> tuple[str, str, str]:
    """Methods, an allocator and a budget, some of which go with nothing."""
    draw = random.Random(seed)
    names = methods_drawn(draw, rotated=0.5).values()
    return "+".join(names), draw.choice(sorted(ALLOCATORS)), draw.choice(BUDGETS)


def drawn(seed: int) -> str:
    """A recipe as one line, some of which no tool could follow."""
    draw = random.Random(seed)
    stages = methods_drawn(draw)
    method = stages["method"]
    stated = []
    if method != "df11" or draw.random() < 0.2:
        stated.append(coding_drawn(draw, method))
    for stage, name in stages.items():
        before = "" if stage == "method" else f"{name}."
        settings = SETTINGS[name]
        # what learns states its steps, of which it takes hundreds otherwise
        chosen = {key for key in settings if key == "steps" or draw.random() < 0.4}
        stated += [f"{before}{key}={draw.choice(settings[key])}" for key in settings if key in chosen]
    if draw.random() < 0.3:
        stated.append(f"embedding_bits={draw.choice([2, 4, 8])}")
    if draw.random() < 0.15:
        stated.append(f"activation={draw.choice(['int8', 'int8', 'int8-static', 'fp8', 'int4'])}")
    return f"{'+'.join(stages.values())}:{','.join(stated)}"


def coding_drawn(draw: random.Random, method: str) -> str:
    """What a recipe states of the coding."""
    if draw.random() < TABLES.get(method, 0.02):
        return f"table={draw.choice([2, 3, 4])}"
    if method in SIGNS and draw.random() < SIGNS[method]:
        return f"binary=true,group={draw.choice([0, 32, 64, 96, 128])}"
    codebook = draw.choice(CODEBOOKS.get(method, ["nf4", "fp4", "gauss2", "gauss3"]))
    width = draw.choice(BITS.get(method, [2, 3, 4, 5, 6, 8]))
    by_name = draw.random() < (0.9 if method in CODEBOOKS else 0.2)
    stated = [f"codebook={codebook}" if by_name else f"bits={width}"]
    stated.append(f"group={draw.choice([0, 0, 32, 32, 64, 64, 96, 256, 48])}")
    if draw.random() < (0.05 if by_name else 0.3):
        stated.append(f"symmetric={draw.choice(['true', 'false'])}")
    if draw.random() < 0.3:
        stated.append(f"scale_dtype={draw.choice(['bfloat16', 'float16'])}")
    return ",".join(stated)


def fewest_bits(recipe: str) -> int:
    """Of the codes of all linears, the embedding's and those of inputs among them."""
    stated = dict(part.split("=") for part in recipe.partition(":")[2].split(","))
    codebook = stated.get("codebook")
    bits = stated.get("bits") or stated.get("table") or (bits_of(codebook) if codebook else 4)
    if codebook in POINTS:  # whose codes are those of several values
        bits = int(bits) // POINTS[codebook].shape[1]
    bits = 2 if "binary" in stated else bits
    if stated.get("balance") == "0.0":  # codes of 8 bits that are chosen for the narrower ones
        bits = 4
    inputs = 4 if stated.get("activation") == "int4" else 8
    return min(int(bits), inputs, int(stated.get("embedding_bits", 8)))


class Source:
    """A model to compress, and how far a model is from it that has nothing to do with it."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self.path = save_model(folder / architecture, architecture, **SIZES[architecture])
        self.ids = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
        self.logits = self.read(load(self.path))
        self.stranger = self.divergence(self.read(make_model(architecture, 1, **SIZES[architecture])))

    @torch.no_grad()
    def read(self, model: Any) -> torch.Tensor:
        return model(self.ids).logits.float()

    def divergence(self, logits: torch.Tensor) -> float:
        own, other = self.logits.log_softmax(-1), logits.log_softmax(-1)
        return float((own.exp() * (own - other)).sum(-1).mean())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    return {architecture: Source(folder, architecture) for architecture in SIZES}


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out"
    shutil.rmtree(tmp_path)


def test_every_method_is_drawn() -> None:
    seeds = [seed for seed in range(RECIPES) if not planned(seed)]
    lines = [drawn(seed) for seed in seeds]
    joined = {name for line in lines for name in line.partition(":")[0].split("+")}
    assert joined == {name for known in STAGES.values() for name in known}
    assert len(set(lines)) == len(lines)
    # methods of tables go with nothing that folds or learns
    assert sum(is_recipe(line) for line in lines) > 0.4 * len(lines)


def test_every_allocator_is_drawn_with_and_without_a_rotation() -> None:
    plans = [drawn_plan(seed) for seed in range(RECIPES) if planned(seed)]
    assert 25 <= len(plans) <= 35
    for rotated in (False, True):
        drawn_with = {name for methods, name, _ in plans if methods.startswith("hadamard") == rotated}
        assert drawn_with == set(ALLOCATORS)
    assert sum(planned(seed) for seed in range(QUICK)) == 6


def is_recipe(line: str) -> bool:
    try:
        parse_recipe(line)
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed < QUICK else pytest.mark.full) for seed in range(RECIPES)]
)
def test_a_recipe_runs_or_is_refused_before_work(
    seed: int, sources: dict[str, Source], text: Path, output: Path
) -> None:
    source = sources[list(SIZES)[seed % len(SIZES)]]
    if planned(seed):
        check_plan(*drawn_plan(seed), source, text, output)
    else:
        check(drawn(seed), source, text, output)


@pytest.mark.parametrize("architecture", list(SIZES))
@pytest.mark.parametrize("before", ["", "awq+", "hadamard+cfp+"])
@pytest.mark.parametrize("coding", ["bits=4,group=32", "bits=3,group=0,symmetric=true,activation=int4"])
def test_learned_matrices_go_behind_folds_and_rotations(
    architecture: str, before: str, coding: str, sources: dict[str, Source], text: Path, output: Path
) -> None:
    recipe = f"{before}rtn+flatquant:{coding},flatquant.steps=2,flatquant.batch=2"
    assert check(recipe, sources[architecture], text, output)


@pytest.mark.parametrize("architecture", list(SIZES))
def test_columns_in_an_order_of_their_own_are_found_again(
    architecture: str, sources: dict[str, Source], text: Path, output: Path
) -> None:
    recipe = "gptq+eora:bits=4,group=32,static_groups=false,eora.rank=4,embedding_bits=4"
    assert check(recipe, sources[architecture], text, output)


def check(recipe: str, source: Source, text: Path, output: Path) -> bool:
    """Whether the recipe ran; what it left behind is as it must be either way."""
    refused: UserError | None = None
    try:
        api.compress(
            str(source.path), output, recipe=recipe, calibration=str(text), sequences=4, length=32,
            measure_speed=False, measure_spread=False, max_kl=100.0, max_perplexity_increase=1e9,
        )  # fmt: skip
    except UserError as error:
        refused = error
    if refused is not None:
        check_refusal(refused, recipe, re.split("[+:,=]", recipe), output)
        return False
    divergence = source.divergence(source.read(load(output)))
    assert divergence < SHARE[fewest_bits(recipe)] * source.stranger, recipe
    return True


def check_plan(methods: str, allocator: str, memory: str, source: Source, text: Path, output: Path) -> bool:
    """Whether the plan was made; within its bytes, whatever the gate thinks of a random model."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(allocation, "Evopress", partial(Evopress, generations=2, offspring=4))
        patched.setattr(effort, "planned_recipe", quick_recipe)
        try:
            result = api.fit(
                str(source.path), memory, output, method=methods, allocator=allocator,
                calibration=str(text), sequences=4, length=32, measure_speed=False, measure_spread=False,
                max_kl=100.0, max_perplexity_increase=1e9,
            )  # fmt: skip
        except GateRefused as refused:
            result = refused.result  # type: ignore[attr-defined]
        except UserError as refused:
            parts = [*methods.split("+"), allocator, memory, "budget"]
            check_refusal(refused, f"{methods} by {allocator} in {memory}", parts, output)
            return False
    assert result.total_bytes <= result.budget_bytes
    plan = load_plan(Path(result.output) / "plan.yaml")
    assert plan.allocator == allocator
    assert plan.method is not None
    assert plan.method.name == methods
    assert source.divergence(source.read(load(result.output))) < source.stranger
    return True


def quick_recipe(name: str) -> Recipe:
    """What `fit` makes of a name, with three updates where it learns hundreds."""
    recipe = planned_recipe(name)
    block, whole = (
        None if method is None else replace(method, steps=3, batch=2)
        for method in (recipe.block, recipe.whole)
    )
    return replace(recipe, block=block, whole=whole)


def check_refusal(refused: UserError, line: str, parts: Iterable[str], output: Path) -> None:
    """It says why, naming something that was drawn, and nothing is left."""
    left = [path.name for path in output.parent.iterdir()]
    assert not left, f"{line}: {refused}, and left {left}"
    assert refused.given, line
    assert refused.expected, line
    assert refused.remedy, line
    words = [part for part in parts if len(part) > 2 and not part.replace(".", "").isdigit()]
    assert any(word in str(refused) for word in words), f"{line}: {refused}"
