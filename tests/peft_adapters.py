"""Random adapters made by PEFT and saved by it, and the models that they belong to."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressed import save_compressed
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels.adapters import Adapter, LaidOut, Segment
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel
from tailorbird.run.module_adapters import ModuleAdapter
from tailorbird.run.paged import PagedModel
from tailorbird.serve.adapters.kinds import open_adapter, read_linears
from tiny import make_model


def pair(directory: Path, architecture: str, **config: Any) -> tuple[FusedModel, Any]:
    """A packed model in `directory` as compiled blocks, and dense modules with the same weights."""
    dense = save_compressed(directory, make_model(architecture, **config), IntegerCoding(4, 32))
    return FusedModel(load(str(directory))), dense


def wrapped(model: Any, config: Any, seed: int = 0, size: float = 0.2) -> Any:
    """A copy of `model` with a random adapter of PEFT."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.dtype))
    return made


def save(made: Any, directory: Path, **changes: Any) -> Path:
    """Save an adapter with PEFT, and change its config; returns `directory`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(directory)
    if changes:
        change_config(directory, changes)
    return directory


def change_config(directory: Path, changes: Mapping[str, Any]) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def opened(fused: FusedModel, directory: Path) -> Adapter:
    """An adapter, read from its directory."""
    return fused.adapter(read_linears(open_adapter(directory, fused.linears)))


def opened_for_modules(paged: PagedModel, directory: Path) -> ModuleAdapter:
    """The same for a model that runs through its modules."""
    return paged.adapter(read_linears(open_adapter(directory, paged.linears)))


def prompt(tokens: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(seed))


def logits(model: FusedModel | PagedModel, ids: Tensor, adapter: LaidOut | None) -> Tensor:
    """Logits of one sequence, all of it with this adapter: ``[tokens, vocab_size]``."""
    count = len(ids)
    pages = model.pages(1)
    pages.reach(count)
    segments = [] if adapter is None else [Segment(0, count, adapter)]
    positions, zeros = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    return model.step(ids, positions, zeros, pages, torch.arange(count), segments)


def expected_logits(made: Any, ids: Tensor) -> Tensor:
    """What PEFT's model gives."""
    with torch.no_grad():
        return made(ids[None], use_cache=False).logits[0].float()
