"""`fit` to a speed, and results that are slower than their source."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tailorbird
from tailorbird.compress import fit, planning
from tailorbird.compress.result import FitResult
from tailorbird.errors import BudgetError, GateRefused, SettingsError
from tailorbird.evaluate import speed as speed_module
from tailorbird.evaluate.stand_ins import Kernel
from tailorbird.formats.packed import FloatCoding
from tailorbird.hardware.cost import AttentionTimes, KernelTimes
from tailorbird.model.json_file import read_json
from tailorbird.plan import speed as planned_speed
from tailorbird.plan.candidates import candidate_codings
from tailorbird.plan.planfile import load_plan
from tiny import save_model

KERNELS = {Kernel(coding, int8) for coding in candidate_codings(None, "bfloat16") for int8 in (False, True)}
NOTHING = AttentionTimes(0.0, 0.0, 0.0)
#: Every bit of a weight takes a nanosecond, whatever is done with the inputs.
RATES = {kernel.name: ((kernel.coding.bits * 1e-9,) * 2,) for kernel in KERNELS}
RATES |= {Kernel(FloatCoding("float32")).name: ((3.2e-8, 3.2e-8),)}
TIMES = KernelTimes(
    threads=1, piece=512, tokens=(1,), products=RATES, heads=RATES,
    streaming=((1, 0.0),), block=0.0, token=0.0, norms=0.0, activation=0.0, alone=NOTHING,
    alone_streamed=NOTHING, together=NOTHING, step=0.0, step_streamed=0.0, sequence=0.0, begin=0.0,
    begin_block=0.0, logit=0.0, lookup=0.0, unpacked=0.0,
)  # fmt: skip


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tailorbird.fit` of a tiny model on a machine whose kernels are known."""
    monkeypatch.setattr(planned_speed, "kernel_times", lambda *_: TIMES)
    monkeypatch.setattr(planned_speed, "timing_seconds", lambda *_: 0.0)
    rng = random.Random(0)
    text = tmp_path / "text.jsonl"
    words = ["alpha", "beta", "gamma", "delta"]
    text.write_text("\n".join(json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(24)))
    source = save_model(tmp_path / "model", "llama")

    def fit(name: str, memory: str | None = None, **options: Any) -> FitResult:
        settings = {"measure_speed": False, "measure_spread": False, **options}
        try:
            return tailorbird.fit(
                str(source),
                memory,
                tmp_path / name,
                calibration=str(text),
                sequences=4,
                length=32,
                **settings,
            )
        except GateRefused as refused:
            return refused.result  # type: ignore[attr-defined, no-any-return]

    return fit


def multiplied(result: FitResult) -> int:
    """Bits that a step multiplies by."""
    plan = load_plan(Path(result.output) / "plan.yaml")
    return sum(
        place.coding.coding().bits * place.shape[0] * place.shape[1]
        for place in plan.places
        if place.shape is not None and place.role != "embedding"
    )


def test_a_plan_keeps_the_memory_and_the_speed(make: Any) -> None:
    """Memory alone gives a plan; asked for more speed than that, another, no larger and worse."""
    roomy = make("roomy", "60%")
    rate = 1e9 / multiplied(roomy)
    fast = make("fast", "60%", min_speed=f"{1.3 * rate:.1f}tok/s")
    assert fast.predicted["decode_tokens_per_s"] == pytest.approx(1e9 / multiplied(fast))
    assert fast.predicted["decode_tokens_per_s"] >= 1.3 * rate * (1 - 1e-3)
    assert fast.total_bytes <= fast.budget_bytes
    assert fast.predicted["kl"] > roomy.predicted["kl"]
    latency = make("latency", "60%", max_latency=f"{1e3 / (1.3 * rate):.6f}ms")
    assert multiplied(latency) == multiplied(fast)
    plan = load_plan(Path(fast.output) / "plan.yaml")
    assert plan.budget is not None
    assert plan.budget.step_seconds == pytest.approx(1 / (1.3 * rate), rel=1e-3)
    assert "decode_tokens_per_s" not in roomy.predicted


def test_speed_alone_is_a_budget(make: Any) -> None:
    result = make("result", None, min_speed="3000tok/s")
    assert multiplied(result) <= 1e9 / 3000
    assert result.total_bytes < result.budget_bytes


def test_concurrent_sequences_share_a_step(make: Any) -> None:
    alone = make("alone", "60%", min_speed="4000tok/s", context=64)
    together = make("together", "60%", min_speed="16000tok/s", context=64, concurrency=4)
    assert alone.predicted["step_seconds"] == pytest.approx(together.predicted["step_seconds"], rel=0.1)
    assert together.predicted["decode_tokens_per_s"] >= 16_000


def test_a_speed_out_of_reach_says_what_can_be_had(make: Any, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"1e\+06 tok/s.*tok/s\), predicted for the fastest plan"):
        make("result", "60%", min_speed="1000000tok/s")
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("quick", [True, False])
def test_it_is_refused_before_scores_are_taken_unless_timing_kernels_takes_longer(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    monkeypatch.setattr(planned_speed, "timing_seconds", lambda *_: 0.0 if quick else 1e9)
    scored, score = [], planning.score
    monkeypatch.setattr(planning, "score", lambda *args: scored.append(1) or score(*args))
    with pytest.raises(BudgetError, match="predicted for the fastest plan"):
        make("result", "60%", min_speed="1000000tok/s")
    assert bool(scored) is not quick
    assert not list(tmp_path.glob("result*"))


def test_unfinished_work_that_has_a_plan_goes_on_though_kernels_are_timed_slower(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "compress_into", killed)
        with pytest.raises(KeyboardInterrupt):
            make("result", "60%", min_speed="3000tok/s")
    slower = dict.fromkeys(RATES, ((1.0, 1.0),))
    monkeypatch.setattr(
        planned_speed, "kernel_times", lambda *_: replace(TIMES, products=slower, heads=slower)
    )
    assert make("result", "60%", min_speed="3000tok/s", resume=True).predicted["step_seconds"] > 1


def test_a_dry_run_tells_the_fastest_plan_as_far_as_kernels_are_timed(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[KernelTimes | None] = [None]
    monkeypatch.setattr(planned_speed, "known_kernel_times", lambda *_: known[0])
    reach, beyond = ({"min_speed": f"{speed}tok/s", "dry_run": True} for speed in (3000, 1_000_000))
    untimed = make("result", "60%", **beyond)
    assert (untimed.asked_step_seconds, untimed.fastest_step_seconds, untimed.fits) == (1e-6, None, True)
    known[0] = TIMES
    possible, impossible = make("result", "60%", **reach), make("result", "60%", **beyond)
    assert possible.fits
    assert possible.fastest_step_seconds == impossible.fastest_step_seconds
    assert not impossible.fits
    assert "ask for less speed" in impossible.advice
    told = (
        f"at least {1e3 * possible.fastest_step_seconds:.3g} ms ({possible.fastest_tokens_per_s:.3g} tok/s)"
    )
    with pytest.raises(BudgetError, match=re.escape(told)):
        make("result", "60%", min_speed="1000000tok/s")
    plain = make("result", "60%", dry_run=True)
    assert (plain.asked_step_seconds, plain.fastest_step_seconds) == (None, None)


def test_without_any_budget_the_flags_are_named(make: Any) -> None:
    with pytest.raises(SettingsError, match="--memory, --min-speed, --max-latency or --max-kl"):
        make("result")


def slow(*_: Any) -> dict[str, Any]:
    return {
        "source_prefill_tokens_per_s": 2.0, "result_prefill_tokens_per_s": 2.0, "prefill_ratio": 1.0,
        "source_decode_tokens_per_s": 2.0, "result_decode_tokens_per_s": 1.0, "ratio": 0.5, "slower": True,
        "batch": 1, "predicted_decode_tokens_per_s": None, "paths": {"int4 g64 · reference": 1},
    }  # fmt: skip


def test_a_result_slower_than_its_source_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "compare_in_child", slow)
    result = make("result", "60%", measure_speed=True)
    assert not result.accepted
    assert result.output.endswith("result.rejected")
    (check,) = (check for check in result.checks if check["name"] == "speed")
    assert not check["passed"]
    assert "0.50 times" in check["detail"]
    assert "--allow-slower" in check["detail"]
    assert any(w.startswith("SLOWER") and "int4 g64 · reference" in w for w in result.warnings)
    assert read_json(Path(result.output) / "report.json")["result"]["accepted"] is False


def test_one_that_is_slower_in_most_rounds_is_taken_and_said_to_be(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        speed_module, "compare_in_child", lambda *_: {**slow(), "ratio": 0.9, "slower": False}
    )
    result = make("result", "60%", measure_speed=True)
    (check,) = (check for check in result.checks if check["name"] == "speed")
    assert check["passed"]
    assert any(w.startswith("SLOWER") and "int4 g64 · reference" in w for w in result.warnings)


def test_it_is_taken_where_that_is_allowed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "compare_in_child", slow)
    result = make("result", "60%", measure_speed=True, allow_slower=True, min_speed="3000tok/s")
    (check,) = (check for check in result.checks if check["name"] == "speed")
    assert check["passed"]
    assert any(warning.startswith("SLOWER") for warning in result.warnings)
    assert any("asked for 3000 tok/s" in warning for warning in result.warnings)
