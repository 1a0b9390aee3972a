"""The budget: what a user writes for ``--memory``, and how many bytes it leaves for weights.

A budget covers the tensor data of the result plus the KV cache at a stated context and concurrency.
This file reads and writes sizes and refuses budgets that cannot work or are not needed; it doesn't
know which coding goes where (`allocate`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from tailorbird.errors import BudgetError, SettingsError

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{infix}b": base ** (power + 1)
    for power, prefix in enumerate("kmgt")
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z%]*)\s*", re.ASCII | re.IGNORECASE)
_LONGEST_SIZE = 40  # characters; a longer number is a mistake, not a memory size
_EXPECTED_SIZE = "a size such as `1.5GiB`, `800MB`, `60%`, `3.25bpw` or a number of bytes"


def parse_size(text: str | int, dense_bytes: int, parameters: int) -> int:
    """Read a memory size.

    Parameters
    ----------
    text : str or int
        ``"1.5GiB"`` (1024³), ``"800MB"`` (1000²), ``"60%"`` of `dense_bytes`, ``"3.25bpw"`` (bits per
        weight over all `parameters`), or a whole number of bytes. Units in any case.
    dense_bytes : int
        Bytes that the source takes with every parameter at 2 bytes (a tied tensor once).
    parameters : int
        Number of parameters of the source (a tied tensor once).

    Returns
    -------
    int
        Bytes, at least 1, rounded down.

    Raises
    ------
    SettingsError
        If `text` is not such a size, or is smaller than one byte.
    """
    shown = str(text)[:_LONGEST_SIZE]
    match = _SIZE.fullmatch(str(text)) if len(str(text)) <= _LONGEST_SIZE else None
    if match is None:
        raise SettingsError(f"the memory size `{shown}`", _EXPECTED_SIZE, "write it like one of these")
    number, unit = Fraction(match[1]), match[2].lower()
    if unit == "%":
        size = number * dense_bytes / 100
    elif unit == "bpw":
        size = number * parameters / 8
    elif unit in _UNITS:
        size = number * _UNITS[unit]
        if not unit and size.denominator != 1:
            raise SettingsError(
                f"the memory size `{shown}`, which is not a whole number of bytes",
                _EXPECTED_SIZE,
                f"add a unit, for example `{match[1]}GiB`",
            )
    elif unit in "kmgt":
        raise SettingsError(
            f"the memory size `{shown}`, whose unit could be binary or decimal",
            _EXPECTED_SIZE,
            f"write `{match[1]}{unit.upper()}iB` or `{match[1]}{unit.upper()}B`",
        )
    else:
        raise SettingsError(
            f"the memory size `{shown}` with the unknown unit `{match[2]}`",
            "one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, % or bpw",
            f"write {_EXPECTED_SIZE}",
        )
    if size < 1:
        raise SettingsError(f"the memory size `{shown}`, less than one byte", _EXPECTED_SIZE, "give more")
    return math.floor(size)


def with_last_unit(texts: Sequence[str]) -> list[str]:
    """Sizes of a list, of which those without a unit get that of the last: 2.25,3.25,4.25bpw.

    What isn't a number stays as it is, for `parse_size` to refuse; so do all where the last has no unit.
    """
    read = [_SIZE.fullmatch(text) for text in texts]
    last = read[-1] if read else None
    unit = last[2] if last else ""
    return [
        f"{match[1]}{unit}" if match and not match[2] else text
        for text, match in zip(texts, read, strict=True)
    ]


def format_size(size: int) -> str:
    """A size as people read it: ``"1.43 GiB"``, ``"812 bytes"``."""
    if abs(size) < 1024:
        return f"{size} bytes"
    value, unit = float(size), ""
    for unit in ("KiB", "MiB", "GiB", "TiB"):  # noqa: B007  the last one reached is the unit
        value /= 1024
        if abs(value) < 999.995:
            break
    return f"{value:.2f} {unit}"


def enough_size(size: int) -> str:
    """The smallest two-decimal size that holds `size` bytes, as `parse_size` reads it: ``"1.44GiB"``."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            hundredths = math.ceil(Fraction(size * 100, 1024**power))
            return f"{hundredths // 100}.{hundredths % 100:02d}{unit}"
    return f"{size}B"


@dataclass(frozen=True)
class Budget:
    """What may be used, in bytes.

    Attributes
    ----------
    text : str
        As the user wrote it.
    total_bytes : int
        Weights and KV cache together.
    context : int or None
        Tokens per sequence for which the KV cache is counted; None counts none.
    concurrency : int
        Sequences held at the same time.
    kv_bytes : int
        KV cache at `context` × `concurrency`, 16-bit.
    step_seconds : float or None
        What a decoding step may take, all concurrent sequences together; None doesn't say.
    speed_text : str or None
        That, as the user wrote it.
    max_kl : float or None
        What the smallest plan is sought for, nats per token; None where bytes or seconds are the budget.
    """

    text: str
    total_bytes: int
    context: int | None = None
    concurrency: int = 1
    kv_bytes: int = 0
    step_seconds: float | None = None
    speed_text: str | None = None
    max_kl: float | None = None

    @property
    def weight_bytes(self) -> int:
        """What is left for tensor data."""
        return self.total_bytes - self.kv_bytes


def read_budget(
    text: str | int,
    *,
    dense_bytes: int,
    parameters: int,
    smallest_bytes: int,
    kv_bytes: Callable[[int, int], int],
    longest_context: int,
    context: int | None = None,
    concurrency: int | None = None,
) -> Budget:
    """Turn ``--memory``, ``--context`` and ``--concurrency`` into a budget that can be planned for.

    Parameters
    ----------
    text : str or int
        As in `parse_size`.
    dense_bytes, parameters : int
        As in `parse_size`.
    smallest_bytes : int
        Tensor data of the smallest plan there is for this model.
    kv_bytes : callable
        ``(context, concurrency) -> bytes`` of the 16-bit KV cache; never falls as either grows.
    longest_context : int
        Tokens that the model can attend to.
    context, concurrency : int or None
        As given; concurrency is 1 where it is not.

    Raises
    ------
    SettingsError
        For a size that can't be read, a concurrency without a context, or a context the model lacks.
    BudgetError
        If the KV cache alone, or with the smallest plan, exceeds the budget, or if the uncompressed
        model already fits.
    """
    total = parse_size(text, dense_bytes, parameters)
    text = str(text).strip()
    if concurrency is not None and concurrency < 1:
        raise SettingsError(f"--concurrency {concurrency}", "1 or more", "say how many sequences run at once")
    if context is None:
        if concurrency not in (None, 1):
            raise SettingsError(
                f"--concurrency {concurrency} without --context",
                "both, since the KV cache grows with their product",
                "add --context N, the tokens that each sequence may hold",
            )
        budget = Budget(text, total)
    else:
        if not 1 <= context <= longest_context:
            raise SettingsError(
                f"--context {context}",
                f"1 to {longest_context}, the model's own",
                "give a context in this range",
            )
        budget = Budget(text, total, context, concurrency or 1, kv_bytes(context, concurrency or 1))
        _check_kv(budget, smallest_bytes, kv_bytes)
    if budget.weight_bytes < smallest_bytes:
        smallest = smallest_bytes + budget.kv_bytes
        raise BudgetError(
            f"a budget of {_size(total)}",
            f"at least {_size(smallest)}, the smallest possible plan{_with_kv(budget)}",
            f"give --memory {enough_size(smallest)} or more",
        )
    dense = dense_bytes + budget.kv_bytes
    if total >= dense:
        raise BudgetError(
            f"a budget of {_size(total)}",
            f"less than {_size(dense)}, which the model takes at 16 bits{_with_kv(budget)}",
            "the model already fits: use it as it is, or give a smaller --memory",
        )
    return budget


def _check_kv(budget: Budget, smallest_bytes: int, kv_bytes: Callable[[int, int], int]) -> None:
    """Refuse a KV cache that leaves no room for the smallest plan where a shorter context would."""
    if budget.context is None or budget.weight_bytes >= smallest_bytes:
        return
    fits, exceeds = 0, budget.context  # kv_bytes(exceeds) is too much; bisect the longest that isn't
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if budget.total_bytes - kv_bytes(middle, budget.concurrency) >= smallest_bytes:
            fits = middle
        else:
            exceeds = middle
    needed = smallest_bytes + budget.kv_bytes
    if fits:
        remedy = f"--context {fits} would fit, or give --memory {enough_size(needed)} or more"
    elif budget.concurrency > 1:
        remedy = (
            f"no context fits at this concurrency: lower it, or give --memory {enough_size(needed)} or more"
        )
    else:
        remedy = f"no context fits: give --memory {enough_size(needed)} or more"
    share = "more than the whole budget" if budget.weight_bytes <= 0 else "too much of the budget"
    raise BudgetError(
        f"a KV cache of {_size(budget.kv_bytes)} for --context {budget.context} × --concurrency "
        f"{budget.concurrency}, {share} of {_size(budget.total_bytes)}",
        f"room beside it for the smallest possible plan, {_size(smallest_bytes)}",
        remedy,
    )


def _size(size: int) -> str:
    return f"{size} bytes ({format_size(size)})" if size >= 1024 else f"{size} bytes"


def _with_kv(budget: Budget) -> str:
    return f" with its KV cache ({format_size(budget.kv_bytes)})" if budget.kv_bytes else ""
