"""Kernels are timed once for a machine, and what is kept is never trusted blindly."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from tailorbird.errors import SettingsError
from tailorbird.evaluate import kernel_times as module
from tailorbird.evaluate import stand_ins
from tailorbird.evaluate.kernel_times import kernel_times, known_kernel_times, timing_seconds
from tailorbird.evaluate.stand_ins import Kernel
from tailorbird.formats.packed import CodebookCoding, FloatCoding, IntegerCoding
from tailorbird.hardware.cache import cache_directory, forget_kernel_times
from tailorbird.hardware.cost import BlockShape, KernelTimes, ModelShape, ProductShape
from tailorbird.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="tailorbird was installed without a compiler")

KERNELS = [
    Kernel(IntegerCoding(4, 64), int8=True),
    Kernel(IntegerCoding(3, 0, symmetric=True)),
    Kernel(CodebookCoding("nf4", 64), int8=True),
    Kernel(CodebookCoding("gauss2", 64)),
    Kernel(FloatCoding("bfloat16")),
    Kernel(FloatCoding("float16")),
]


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the time; what is tested here isn't how long anything takes."""
    monkeypatch.setattr(module, "STREAM_BYTES", 1 << 22)
    monkeypatch.setattr(module, "TOKENS", (1, 4))
    for place in (module, stand_ins):
        monkeypatch.setattr(place, "REPEATS", 1)
        monkeypatch.setattr(place, "MORE_REPEATS", 1)
    monkeypatch.setattr(module, "VOCABULARY", 256)


BACKWARDS = {"blocks": [[-1.0, 1.0]] * 2, "head": [[-1.0, 1.0]] * 2}
PRODUCT = ProductShape("any", 1, 1)
SHAPE = ModelShape((BlockShape((PRODUCT,), 96, 64, 160, cached_bytes=4 * 64),), PRODUCT, 300)


def numbers(times: KernelTimes) -> list[float]:
    found = [getattr(times, f.name) for f in fields(times) if f.type == "float"]
    found += [
        rate
        for part in (times.products, times.heads)
        for rates in part.values()
        for pair in rates
        for rate in pair
    ]
    return found + [share for _, share in times.streaming]


def test_every_kernel_gets_positive_finite_times() -> None:
    times = kernel_times(KERNELS, SHAPE)
    assert {kernel.name for kernel in KERNELS} <= set(times.products)
    assert times.tokens == (1, 4)
    assert times.threads == torch.get_num_threads()
    assert all(math.isfinite(number) and number >= 0 for number in numbers(times))
    assert all(rate > 0 for rates in times.products.values() for pair in rates for rate in pair)
    sizes, shares = zip(*times.streaming, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(shares) == sorted(shares)


def test_what_was_timed_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel_times(KERNELS[:2], SHAPE)

    def never(*_: Any) -> Any:
        raise AssertionError("timed again")

    for name in ("_streaming", "_around_products", "_around_blocks"):
        monkeypatch.setattr(module, name, never)
    asked = []
    real = module._product_times
    monkeypatch.setattr(
        module, "_product_times", lambda kernel, like: (asked.append(kernel), real(kernel, like))[1]
    )
    assert kernel_times(KERNELS[:2], SHAPE) == before
    after = kernel_times(KERNELS, SHAPE)
    assert asked == KERNELS[2:]
    assert {name: after.products[name] for name in before.products} == before.products


def test_what_is_known_is_told_without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_kernel_times(KERNELS[:2], SHAPE) is None
    untimed = timing_seconds(KERNELS[:2], SHAPE)
    before = kernel_times(KERNELS[:2], SHAPE)
    assert known_kernel_times(KERNELS[:2], SHAPE) == before
    assert known_kernel_times(KERNELS[:1], SHAPE) is not None
    assert known_kernel_times(KERNELS, SHAPE) is None
    assert timing_seconds(KERNELS[:2], SHAPE) == 0 < timing_seconds(KERNELS[:3], SHAPE) < untimed
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(SettingsError, match="compiled kernels"):
        known_kernel_times(KERNELS[:1], SHAPE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: "{",
        lambda entry: json.dumps({**entry, "schema": 0}),
        lambda entry: json.dumps({**entry, "identity": {**entry["identity"], "library": "another"}}),
        lambda entry: json.dumps({**entry, "products": {name: {} for name in entry["products"]}}),
        lambda entry: json.dumps({**entry, "products": dict.fromkeys(entry["products"], BACKWARDS)}),
        lambda entry: json.dumps({**entry, "around": {"block": 1.0}}),
        lambda entry: "[]",
    ],
)
def test_what_is_kept_and_damaged_or_of_another_build_is_timed_again(damage: Any) -> None:
    kernel_times(KERNELS[:1], SHAPE)
    (path,) = cache_directory().glob("kernels-*.json")
    path.write_text(damage(json.loads(path.read_text())))
    times = kernel_times(KERNELS[:1], SHAPE)
    assert all(rate > 0 for rates in times.products.values() for pair in rates for rate in pair)
    assert json.loads(path.read_text())["identity"]["library"] == native.fingerprint()


def test_a_kernel_that_was_timed_before_a_kill_stays_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_around_products", killed)
    with pytest.raises(KeyboardInterrupt):
        kernel_times(KERNELS[:2], SHAPE)
    (path,) = cache_directory().glob("kernels-*.json")
    known = json.loads(path.read_text())["products"]
    assert all(any(key.startswith(kernel.name) for key in known) for kernel in KERNELS[:2])


def test_a_refreshed_probe_forgets_the_times() -> None:
    kernel_times(KERNELS[:1], SHAPE)
    forget_kernel_times()
    assert not list(cache_directory().glob("kernels-*.json"))
    assert kernel_times(KERNELS[:1], SHAPE).products


def test_where_nothing_can_be_kept_it_works_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAILORBIRD_CACHE", str(tmp_path / "file" / "cache"))
    assert kernel_times(KERNELS[:1], SHAPE).products


def test_without_the_native_library_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(SettingsError, match="compiler"):
        kernel_times(KERNELS, SHAPE)
