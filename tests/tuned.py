"""Small linears for the methods of tuning, and the settings that fit them."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tailorbird.adapt.methods.adapter import Addition, Attached, Method, Place
from tailorbird.adapt.methods.registry import method_named

#: out_features, in_features by role
SHAPES = {"q": (12, 8), "up": (16, 8), "down": (8, 16)}
#: settings that fit the shapes above
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},
    "rslora": {"rank": 3},
    "lora-xs": {"rank": 3},
    "nora": {"rank": 5, "inner_rank": 2},
    "lamda": {"rank": 4},
    "loldu": {"rank": 5},
    "kasa": {"rank": 3},
    "mos": {"rank": 4, "equivalent_rank": 2, "private_rank": 1, "shards": 2},
    "allora": {"rank": 3},
    "lora-pro": {"rank": 3},
    "ir-qlora": {"rank": 4},
    "qdylora": {"rank": 4},
    "hydra": {"rank": 2},
    "glora": {"rank": 2, "b": "lora", "population": 4, "generations": 2, "kept": 2},
    "elalora": {"rank": 3, "interval": 2, "warmup": 0.1, "settled": 0.2},
    "triadaptlora": {"rank": 4, "growth": 2, "interval": 5},
    "loca": {"count": 20, "located": 0.3},
    "mixlora": {"rank": 2, "experts": 4},
    "goat": {"rank": 4, "experts": 4},
    "ist": {"rank": 3, "taught": 0.5, "interval": 5},
    "density": {"rank": 3, "weight": 0.1},
    "eigenlorax": {"rank": 2, "components": 4, "extra": 1},
}


def small(name: str, **changed: Any) -> Method:
    """A method with settings that fit `places`."""
    if name in ("ist", "density"):
        changed = {"method": "lora"} | changed
    if name == "eigenlorax":
        changed = {"adapters": existing_adapters()} | changed
    return method_named(name, **(SMALL[name] | changed))


def existing_adapters(at: Mapping[str, Place] | None = None) -> tuple[str, ...]:
    """Directories of three LoRA adapters of rank 2, of `at` or of up to three blocks of `places`."""
    shapes = {path: (place.out_features, place.in_features) for path, place in (at or places(3)).items()}
    return _stored_adapters(tuple(shapes.items()))


@functools.cache
def _stored_adapters(shapes: tuple[tuple[str, tuple[int, int]], ...]) -> tuple[str, ...]:
    generator = torch.Generator().manual_seed(9)
    folder = Path(tempfile.mkdtemp(prefix="tailorbird-adapters-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for number in range(3):
        (folder / str(number)).mkdir()
        tensors = {}
        for path, (out_features, in_features) in shapes:
            down = torch.randn(2, in_features, generator=generator)
            up = torch.randn(out_features, 2, generator=generator)
            tensors[f"base_model.model.{path}.lora_A.weight"] = down
            tensors[f"base_model.model.{path}.lora_B.weight"] = up
        save_file(tensors, folder / str(number) / "adapter_model.safetensors")
    return tuple(str(folder / str(number)) for number in range(3))


def places(blocks: int = 2, bias: bool = False, seed: int = 0) -> dict[str, Place]:
    """`q`, `up` and `down` of some blocks, random."""
    torch.manual_seed(seed)
    found = {}
    for block in range(blocks):
        for role, (out_features, in_features) in SHAPES.items():
            path = f"model.layers.{block}.{role}_proj"
            module = nn.Linear(in_features, out_features, bias=bias)
            found[path] = Place(path, role, block, in_features, out_features, module)
    return found


def attach(method: Method, at: Mapping[str, Place] | None = None, seed: int = 1) -> Attached:
    """The method on `at`, or on `places()`."""
    return method.attach(at or places(), torch.Generator().manual_seed(seed))


def additions(attached: Attached, at: Mapping[str, Place]) -> list[tuple[Place, Addition]]:
    """Every linear with what it gains."""
    found = []
    for path, place in at.items():
        addition = attached.addition(path)
        assert addition is not None
        found.append((place, addition))
    return found


def shaken(attached: Attached, scale: float = 0.3, seed: int = 2) -> Attached:
    """With random learned numbers, as after some tuning; places in a spectrum stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if name.endswith("locations"):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype) * scale)
    return attached


def double(attached: Attached) -> Attached:
    """A copy that computes in float64."""
    return copy.deepcopy(attached).double()


def steps(
    attached: Attached,
    loss: Callable[[], Tensor],
    first: int = 0,
    last: int = 100,
    total: int = 100,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Steps of Adam with every hook, and what the optimizer remembers."""
    optimizer = optimizer or torch.optim.Adam(attached.parameters(), lr=0.02)
    for step in range(first, last):
        attached.explore(step, lambda: float(loss().detach()))
        attached.before_step(step, total)
        value = loss()
        penalty = attached.penalty()
        optimizer.zero_grad(set_to_none=True)
        (value if penalty is None else value + penalty).backward()
        attached.after_gradients(step)
        optimizer.step()
        attached.after_update(step)
        follow(optimizer, attached)
    return optimizer


def follow(optimizer: torch.optim.Optimizer, attached: Attached) -> None:
    """Take parameters of another shape into the optimizer, with the states of the rows that were kept."""
    for old, (new, rows) in (attached.resized() or {}).items():
        group = optimizer.param_groups[0]["params"]
        group[next(i for i, p in enumerate(group) if p is old)] = new
        state = optimizer.state.pop(old, {})
        for key, value in state.items():
            if value.shape == old.shape:
                state[key] = torch.zeros_like(new)
                state[key][: len(rows)] = value[rows]
        if state:
            optimizer.state[new] = state


def regression(attached: Attached, at: Mapping[str, Place], seed: int = 3) -> Callable[[], Tensor]:
    """The squared error against a teacher of the method's own class: the same start, shaken."""
    generator = torch.Generator().manual_seed(seed)
    teacher = shaken(copy.deepcopy(attached), 0.5)
    pairs = []
    for place, addition in additions(teacher, at):
        x = torch.randn(64, place.in_features, generator=generator)
        pairs.append((place.path, x, addition(x).detach()))

    def loss() -> Tensor:
        total = torch.zeros(())
        for path, x, wanted in pairs:
            addition = attached.addition(path)
            assert addition is not None
            total = total + (addition(x) - wanted).square().mean()
        return total

    return loss
