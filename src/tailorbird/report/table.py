"""Numbers as a reader wants them, and the rows of the tables that terminal and HTML report share.

Nothing here draws: `cli/output.py` makes terminal tables of these rows, `report.html.j2` makes HTML.
A value that is missing or not finite is shown as an en dash, never as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

ABSENT = "–"
_DENSE_BITS = 16


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite int or float (and not a bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def size_text(count: Any) -> str:
    """Bytes in the largest binary unit that leaves at least 1, three digits: ``4.06 MiB``."""
    if not is_number(count):
        return ABSENT
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1023.5:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def duration_text(seconds: Any) -> str:
    """Seconds as ``0.42 s``, ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if not is_number(seconds):
        return ABSENT
    if abs(seconds) < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def number_text(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits, thousands separated; exponents only when far from 1."""
    if not is_number(value):
        return ABSENT
    if value == 0:
        return "0"
    if isinstance(value, int):
        return f"{value:,}"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent > 8:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def share_text(part: Any, whole: Any = 1.0) -> str:
    """`part` of `whole` in percent: ``30.2 %``."""
    if not is_number(part) or not is_number(whole) or whole == 0:
        return ABSENT
    return f"{100 * part / whole:.1f} %"


def change_text(before: Any, after: Any) -> str:
    """Relative change with its sign: ``+3.1 %``."""
    if not is_number(before) or not is_number(after) or before == 0:
        return ABSENT
    percent = round(100 * (after - before) / before, 1)
    return f"{percent:+.1f} %".replace("-", "−") if percent else "±0.0 %"


def rate_text(rate: Any, unit: str) -> str:
    """Bytes, operations or tokens per second with a decimal prefix: ``12.3 GB/s``."""
    if not is_number(rate):
        return ABSENT
    value, prefix = float(rate), ""
    for larger in ("k", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            break
        value, prefix = value / 1000, larger
    return f"{number_text(value)} {prefix}{unit}/s"


@dataclass(frozen=True)
class Row:
    """One measure: what the source had, what was predicted, what the result has; texts, "" where absent."""

    name: str
    source: str = ""
    predicted: str = ""
    result: str = ""
    remark: str = ""


def dense_bytes(result: Mapping[str, Any]) -> float | None:
    """Bytes of the source with every parameter at 2 bytes, from ``weight_bytes`` and ``bits_per_weight``."""
    weight_bytes, bits = result.get("weight_bytes"), result.get("bits_per_weight")
    if not is_number(weight_bytes) or not is_number(bits) or not bits:
        return None
    return weight_bytes * _DENSE_BITS / bits


def result_rows(result: Mapping[str, Any]) -> list[Row]:
    """The table that closes every `fit` and `compress`.

    Parameters
    ----------
    result : mapping
        The fields of `FitResult`; any of them may be missing.

    Returns
    -------
    list of Row
        Sizes, quality, speed and cost of the run, in this order; rows without any value are left out.
    """
    predicted = result.get("predicted") or {}
    speed = result.get("speed") or {}
    dense, kv = dense_bytes(result), result.get("kv_bytes")
    total, budget = result.get("total_bytes"), result.get("budget_bytes")
    dense_total = None if dense is None else dense + (kv if is_number(kv) else 0)
    rows = [
        Row("weights", size_text(dense), "", size_text(result.get("weight_bytes")), "at 16 bits before"),
        Row(
            "weights + KV cache" if kv else "total",
            size_text(dense_total),
            "",
            size_text(total),
            "" if budget is None else f"{share_text(total, budget)} of the budget of {size_text(budget)}",
        ),
        Row("bits per weight", str(_DENSE_BITS), "", number_text(result.get("bits_per_weight"))),
        Row(
            "perplexity",
            number_text(result.get("perplexity_before"), 4),
            "",
            number_text(result.get("perplexity_after"), 4),
            change_text(result.get("perplexity_before"), result.get("perplexity_after")),
        ),
        Row(
            "KL, mean",
            "0",
            number_text(predicted.get("kl")),
            number_text(result.get("kl_mean")),
            "nats/token",
        ),
        Row("KL, 99th percentile", "0", "", number_text(result.get("kl_p99")), "nats/token"),
        Row("top-1 agreement", "100.0 %", "", share_text(result.get("top1_agreement"))),
        *_gains(result.get("methods") or []),
        Row(
            f"decoding, batch {speed.get('batch', 1)}",
            number_text(speed.get("source_decode_tokens_per_s")),
            number_text(speed.get("predicted_decode_tokens_per_s")),
            number_text(speed.get("result_decode_tokens_per_s")),
            f"tokens/s, {number_text(speed.get('ratio'))}×" if is_number(speed.get("ratio")) else "tokens/s",
        ),
        Row(
            "time",
            "",
            duration_text(predicted.get("seconds")),
            duration_text(result.get("seconds")),
            "this run",
        ),
        Row(
            "peak memory",
            "",
            size_text(predicted.get("peak_rss_bytes")),
            size_text(result.get("peak_rss_bytes")),
            "this run",
        ),
    ]
    return [row for row in rows if row.result != ABSENT]


def _gains(methods: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What methods gained that measure it: blocks learned, and the whole model."""
    rows = []
    for method in methods:
        for key, words in (("block_error", "mean error of blocks"), ("kl", "nats/token, kept-back text")):
            before, after = method.get(f"{key}_before"), method.get(f"{key}_after")
            change = f"{number_text(before)} before, {change_text(before, after)}; {words}"
            tried, kept = method.get("tried"), method.get("kept")
            if is_number(tried) and is_number(kept) and kept < tried:
                change += "; dropped" if tried == 1 else f"; dropped in {tried - kept} of {tried}"
            rows.append(Row(f"after {method.get('name')}", "", "", number_text(after), change))
    return [row for row in rows if row.result != ABSENT]


@dataclass(frozen=True)
class StageRow:
    """One stage of a run, as texts."""

    name: str
    memory: str
    device: str
    disk: str
    seconds: str


def stage_rows(stages: Sequence[Mapping[str, Any]]) -> list[StageRow]:
    """Rows of the dry run: what each stage will take.

    Parameters
    ----------
    stages : list of mappings
        The fields of `Stage`: ``name peak_rss_bytes device_bytes disk_bytes seconds``.
    """
    return [
        StageRow(
            str(stage.get("name", "")),
            size_text(stage.get("peak_rss_bytes")),
            size_text(stage.get("device_bytes")),
            size_text(stage.get("disk_bytes")),
            duration_text(stage.get("seconds")),
        )
        for stage in stages
    ]


def is_loud(warning: str) -> bool:
    """Whether a warning is to be shown so that nobody overlooks it: it begins with a word in capitals."""
    first = warning.split(maxsplit=1)[:1]
    return bool(first) and len(first[0]) > 2 and first[0].isupper()


def paths_text(paths: Any) -> str:
    """Names of the code paths that ran, with their counts where known: ``int4 planes (28)``."""
    if not paths:
        return "unknown paths"
    if isinstance(paths, Mapping):
        return ", ".join(f"{name} ({count})" for name, count in sorted(paths.items(), key=str))
    if isinstance(paths, str):
        return paths
    return ", ".join(str(path) for path in paths)


def coding_text(coding: Any) -> str:
    """The short name of a stored coding: ``int4 g64``, ``int8 row``, ``bf16``; ``–`` for anything else."""
    if not isinstance(coding, Mapping):
        return ABSENT
    if coding.get("kind") in ("integer", "codebook", "vector", "double"):
        group = coding.get("group_size")
        symmetric = " sym" if coding.get("symmetric") else ""
        values = f"int{coding.get('bits')}" if coding["kind"] == "integer" else str(coding.get("codebook"))
        double = " double" if coding["kind"] == "double" else ""
        return f"{values} {f'g{group}' if group else 'row'}{symmetric}{double}"
    if coding.get("kind") == "table":
        return f"table{coding.get('bits')}{' fp16' if coding.get('table_dtype') == 'float16' else ''}"
    if coding.get("kind") == "binary":
        group = coding.get("group_size")
        half = " fp16" if coding.get("table_dtype") == "float16" else ""
        return f"binary {f'g{group}' if group else 'row'}{half}"
    if coding.get("kind") == "entropy":
        return "df11"
    dtype = str(coding.get("dtype", ABSENT))
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)


def coding_bits(coding: Any) -> int | None:
    """Bits of one stored value, scales not counted; None where the coding isn't understood."""
    if not isinstance(coding, Mapping):
        return None
    if coding.get("kind") in ("integer", "table"):
        return coding["bits"] if isinstance(coding.get("bits"), int) else None
    if coding.get("kind") in ("codebook", "double"):
        from tailorbird.formats.codebooks import LEVELS, bits_of  # not needed to show help, and loads torch

        name = coding.get("codebook")
        return bits_of(name) if isinstance(name, str) and name in LEVELS else None
    if coding.get("kind") == "vector":
        from tailorbird.formats.codebooks import POINTS, bits_of

        name = coding.get("codebook")
        if not isinstance(name, str) or name not in POINTS:
            return None
        return bits_of(name) // POINTS[name].shape[1]
    if coding.get("kind") == "binary":
        return 2
    if coding.get("kind") == "entropy":
        return 16  # as many hold the value
    return {"bfloat16": 16, "float16": 16, "float32": 32}.get(str(coding.get("dtype")))


def machine_facts(probe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a machine can do, in words.

    Parameters
    ----------
    probe : mapping
        The fields of `Probe`, or of one of its devices; names tell the units.
    """
    facts: list[tuple[str, str]] = []
    for key, value in probe.items():
        name = str(key).replace("_", " ").removesuffix(" bytes")
        if isinstance(value, Mapping):
            facts += [
                (f"{name}, {kind}", rate_text(rate, "OP") if is_number(rate) else setting_text(rate))
                for kind, rate in value.items()
            ]
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for device in value:
                facts += [
                    (f"{name.removesuffix('s')}: {inner}", text) for inner, text in machine_facts(device)
                ]
        elif is_number(value) and str(key).endswith("_bytes"):
            facts.append((name, size_text(value)))
        elif is_number(value) and str(key).endswith("bandwidth"):
            facts.append((name, rate_text(value, "B")))
        elif is_number(value) and "flop" in str(key):
            facts.append((name, rate_text(value, "FLOP")))
        else:
            facts.append((name, setting_text(value) or "none"))
    return facts


def setting_text(value: Any) -> str:
    """A value of any kind as a short text; "" for None and for nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {setting_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(setting_text, value))
    return "" if value is None else str(value)
