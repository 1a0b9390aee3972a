"""Allocation within bytes and seconds: a knapsack with two capacities.

Where the plan that is best within the bytes is fast enough, it is the answer. Elsewhere HiGHS solves the
mixed-integer program with both rows; its plan is checked against both, and `gap` says how far from the best
it may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from tailorbird.plan.allocate import (
    Allocation,
    Group,
    Option,
    PlaceOptions,
    allocate,
    allocation_of,
    merge_together,
    silent_stdout,
)

TIME_LIMIT = 10.0  # seconds for HiGHS
RELATIVE_GAP = 1e-4  # of the loss
_UNITS = 1e5  # capacities in HiGHS's units: its feasibility tolerance of 1e-6 is then 1e-11 of them
#: How much smaller both capacities are made when rounding let a plan exceed one.
_MARGIN = 1e-6


def allocate_timed(
    places: Sequence[PlaceOptions], capacity_bytes: int, capacity_seconds: float
) -> Allocation:
    """The plan with the least loss within both capacities.

    Returns
    -------
    Allocation
        Never above `capacity_bytes`. Above `capacity_seconds` only where no plan is fast enough: then it is
        the fastest there is within the bytes.

    Raises
    ------
    BudgetError, SettingsError
        As `allocate`.
    """
    plan = allocate(places, capacity_bytes)
    if plan.seconds <= capacity_seconds:
        return plan
    groups = merge_together(places, _undominated)
    fastest, _ = _solve(groups, capacity_bytes, math.inf, _seconds)
    if fastest is None or _total(groups, fastest, _seconds) > capacity_seconds:
        return plan if fastest is None else allocation_of(groups, fastest, places, -math.inf)
    picks, bound = _solve(groups, capacity_bytes, capacity_seconds, lambda option: option.loss)
    return allocation_of(groups, picks or fastest, places, bound)


def _undominated(options: list[Option]) -> tuple[Option, ...]:
    """Options than which no other is as small, as fast and as good."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.loss, o.seconds)):
        if not any(known.loss <= option.loss and known.seconds <= option.seconds for known in kept):
            kept.append(option)
    return tuple(kept)


def _solve(
    groups: Sequence[Group],
    capacity_bytes: int,
    capacity_seconds: float,
    cost: Callable[[Option], float],
) -> tuple[list[int] | None, float]:
    """The picks with the least cost, None where HiGHS found none in time, and a lower bound of that cost."""
    margin, bound = 0.0, -math.inf
    for _ in range(3):
        capacities = capacity_bytes * (1 - margin), capacity_seconds * (1 - margin)
        picks, bound = _search(groups, capacities, cost)
        if picks is None:
            return None, bound
        size, seconds = (_total(groups, picks, value) for value in (_bytes, _seconds))
        if size <= capacity_bytes and seconds <= capacity_seconds:
            return picks, bound
        margin = margin * 10 or _MARGIN
    return None, bound


def _search(
    groups: Sequence[Group], capacities: tuple[float, float], cost: Callable[[Option], float]
) -> tuple[list[int] | None, float]:
    """`_solve` in floating point."""
    columns = [(group, option) for group, one in enumerate(groups) for option in one.options]
    count = len(columns)
    one_each = csr_array(
        (np.ones(count), ([group for group, _ in columns], np.arange(count))), shape=(len(groups), count)
    )
    costs = np.array([cost(option) for _, option in columns])
    constraints = [LinearConstraint(one_each, 1, 1)]
    for value, capacity in zip((_bytes, _seconds), capacities, strict=True):
        if math.isfinite(capacity):
            row = np.array([value(option) for _, option in columns]) * (_UNITS / capacity)
            constraints.append(LinearConstraint(csr_array(row[None]), -np.inf, _UNITS))
    scale = 1 / (np.abs(costs).max() or 1.0)
    with silent_stdout():
        result = milp(
            costs * scale,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": TIME_LIMIT, "mip_rel_gap": RELATIVE_GAP},
        )
    bound = -math.inf if result.mip_dual_bound is None else result.mip_dual_bound / scale
    if result.x is None:
        return None, bound
    picks, column = [], 0
    for group in groups:
        picks.append(int(np.argmax(result.x[column : column + len(group.options)])))
        column += len(group.options)
    return picks, bound


def _bytes(option: Option) -> float:
    return option.bytes


def _seconds(option: Option) -> float:
    return option.seconds


def _total(groups: Sequence[Group], picks: Sequence[int], value: Callable[[Option], float]) -> float:
    return math.fsum(value(group.options[pick]) for group, pick in zip(groups, picks, strict=True))
