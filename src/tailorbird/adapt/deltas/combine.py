"""`adapters combine`: several LoRA adapters of one base as one.

What is combined are the changes of the weights, ``s B A``, and not the factors, which mean nothing by
themselves: adapters may differ in rank, scaling and linears. A weighted sum of changes is exactly the product
of the factors beside each other,

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

and is factored anew only where a lower rank is asked for. TIES and DARE act on entries (`entries.py`), have
no such product, and are rounded to the rank (`factors.py`), with the error stated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tailorbird.adapt.deltas.entries import disjoint_mean, drop, generator_of, trim
from tailorbird.adapt.deltas.factors import Truncated, relative_error, truncate, truncate_product
from tailorbird.adapt.deltas.lora_file import LoraFile, check_one_base
from tailorbird.adapt.merge.adapter import write_lora
from tailorbird.adapt.save import ORIGIN
from tailorbird.calibrate.job import Job, check_output
from tailorbird.errors import SettingsError, nearest
from tailorbird.linear.product import Product
from tailorbird.model.writing import write_json
from tailorbird.progress import Progress, Silent

HOW = ("linear", "ties", "dare", "dare-ties")
#: share of entries that stay, unless the user says so
DENSITY = 0.5


@dataclass(frozen=True)
class CombinedLinear:
    """What became of one linear.

    Attributes
    ----------
    name : str
    rank : int
    error : float
        Norm of what the rank doesn't hold, relative to that of the combined change.
    """

    name: str
    rank: int
    error: float


@dataclass(frozen=True)
class CombineResult:
    """A combined adapter.

    Attributes
    ----------
    output, how : str
    weights : list of float
        In the order of the adapters.
    rank : int
        The highest of its linears.
    error : float
        Norm of what the ranks don't hold, relative to that of all combined changes.
    bytes : int
        Of its tensors.
    linears : list of CombinedLinear
        By name.
    """

    output: str
    how: str
    weights: list[float]
    rank: int
    error: float
    bytes: int
    linears: list[CombinedLinear]


def combine_adapters(
    directories: Sequence[Path],
    output: Path,
    weights: Sequence[float] | None = None,
    how: str = "linear",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CombineResult:
    """Combine LoRA adapters of one base into one, linear by linear.

    Parameters
    ----------
    directories : sequence of Path
        In PEFT's layout; they stay as they are.
    output : Path
        Must not exist.
    weights : sequence of float, optional
        One for each adapter. Without them the mean is taken: ``1/n`` for linear and dare; 1 for ties and
        dare-ties, whose mean is over the adapters that agree.
    how : str
        One of `HOW`.
    density : float, optional
        Share of entries that stay with ties, dare and dare-ties, 0.5 if not given.
    rank : int, optional
        Of the result; without it, the sum of the ranks that the adapters have at a linear.
    seed : int
        Of what dare drops.
    progress : Progress, optional

    Raises
    ------
    SettingsError
        Settings that don't fit, adapters of different bases, or what isn't a plain LoRA.
    CheckpointError
        An adapter is damaged.
    """
    progress = progress or Silent()
    density = _check_settings(directories, weights, how, density, rank)
    check_output(output)
    adapters = [LoraFile.open(directory) for directory in directories]
    check_one_base(adapters)
    count = len(adapters)
    used = list(weights) if weights is not None else [1.0 if "ties" in how else 1 / count] * count
    record = {
        "command": "combine", "adapters": [one.fingerprint for one in adapters], "weights": used, "how": how,
        "density": density, "rank": rank, "seed": seed,
    }  # fmt: skip
    with Job(output, record) as job:
        names = sorted({name for adapter in adapters for name in adapter.shapes})
        progress.stage("combine", len(names))
        found: dict[str, Truncated] = {}
        for name in names:
            most = rank or sum(adapter.ranks.get(name, 0) for adapter in adapters)
            parts = [
                (place, Product(product.up * weight, product.down))
                for place, (adapter, weight) in enumerate(zip(adapters, used, strict=True))
                if (product := adapter.product(name)) is not None
            ]
            if how == "linear":
                found[name] = _sum([part for _, part in parts], most)
            else:
                generators = [generator_of(seed, place, name) for place, _ in parts]
                changes = [part.delta() for _, part in parts]
                found[name] = truncate(_entries(changes, how, density, generators), most)
            progress.advance(note=name)
        base = next((adapter.base for adapter in adapters if adapter.base is not None), "")
        products = {name: one.product for name, one in found.items()}
        transposed = any(adapter.settings.config.get("fan_in_fan_out") is True for adapter in adapters)
        size = write_lora(job.partial, products, base, {"fan_in_fan_out": transposed})
        known = next((mark for adapter in adapters if (mark := adapter.base_identity) is not None), None)
        write_json(job.partial / ORIGIN, record | {"base": known, "base_name": base})
        job.publish()
    progress.done()
    linears = [CombinedLinear(name, one.product.down.shape[0], one.error) for name, one in found.items()]
    return CombineResult(
        str(output),
        how,
        used,
        max(one.rank for one in linears),
        relative_error(found.values()),
        size,
        linears,
    )


def _sum(parts: Sequence[Product], rank: int) -> Truncated:
    """The sum of products; as it is where the rank holds the factors beside each other."""
    together = Product(
        torch.cat([part.up for part in parts], dim=1), torch.cat([part.down for part in parts], dim=0)
    )
    own = together.down.shape[0]
    if own <= min(rank, together.up.shape[0], together.down.shape[1]):
        return Truncated(together, together.energy(), 0.0)
    return truncate_product(together, rank)


def _entries(
    changes: Sequence[Tensor], how: str, density: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Weighted changes of one linear as one, by their entries."""
    if how == "ties":
        return disjoint_mean([trim(change, density) for change in changes])
    dropped = [
        drop(change, density, generator) for change, generator in zip(changes, generators, strict=True)
    ]
    return disjoint_mean(dropped) if how == "dare-ties" else sum(dropped[1:], start=dropped[0])


def _check_settings(
    directories: Sequence[Path],
    weights: Sequence[float] | None,
    how: str,
    density: float | None,
    rank: int | None,
) -> float:
    """Refuse settings that don't fit; returns the density."""
    if not directories:
        raise SettingsError("no adapter", "at least one", "name the directories of adapters")
    if how not in HOW:
        raise SettingsError(f"--how {how}", "a way to combine", nearest(how, HOW))
    if weights is not None and len(weights) != len(directories):
        raise SettingsError(
            f"{len(weights)} weights for {len(directories)} adapters", "one for each",
            "give as many --weights as adapters, with commas between them",
        )  # fmt: skip
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise SettingsError(f"weights {list(weights)}", "finite numbers", "correct --weights")
    if how == "linear" and density is not None:
        raise SettingsError(
            f"--density {density} with --how linear", "a way that drops entries", "leave --density out"
        )
    check_density(DENSITY if density is None else density)
    if rank is not None and rank < 1:
        raise SettingsError(f"--rank {rank}", "a rank of at least 1", "give for example --rank 16")
    return DENSITY if density is None else density


def check_density(density: float) -> None:
    """SettingsError where it is no share of entries."""
    if not 0 < density <= 1:
        raise SettingsError(
            f"--density {density}", "a share above 0, up to 1", "give for example --density 0.5"
        )
