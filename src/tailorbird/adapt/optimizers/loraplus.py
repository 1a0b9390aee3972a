"""LoRA+: the matrix that begins as zero learns faster than the other one.

Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models" (https://arxiv.org/abs/2402.12354).
In ``W x + B A x`` of a wide model, B's rate has to be a multiple of A's for both to learn features; the
authors recommend 16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tailorbird.adapt.optimizers.rule import check, check_rates


def lora_plus_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], lr: float, ratio: float = 16.0
) -> list[dict[str, Any]]:
    """Groups of parameters with their rates.

    Parameters
    ----------
    named_parameters : iterable of (str, nn.Parameter)
        What `faces_outputs` is B; everything else learns as A does.
    lr : float
        A's rate.
    ratio : float
        B's rate is this times A's; at least 1.

    Returns
    -------
    list of dict
        ``params`` and ``lr``; a group that would be empty isn't there.

    Raises
    ------
    SettingsError
        For rates that make no sense.
    """
    check_rates(lr, 0.0)
    check(1 <= ratio < float("inf"), "ratio", ratio, "a number from 1 on")
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        (fast if faces_outputs(name) else slow).append(parameter)
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    return [group for group in groups if group["params"]]


def faces_outputs(name: str) -> bool:
    """Whether a parameter is a B: its name ends in ``.up`` or holds ``lora_B``."""
    return name == "up" or name.endswith(".up") or "lora_B" in name
