"""A stand-in for `tailorbird.api` that records its calls, and a way to run command lines."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from types import ModuleType
from typing import Any

import pytest

import tailorbird
import tailorbird.api as real_api
from sample_report import sample
from tailorbird.cli.main import run

FIT = sample()["result"]
DRY_RUN = {
    "model": "m",
    "method": "gptq",
    "parameters": 1000,
    "dense_bytes": 2000,
    "budget_bytes": 900,
    "kv_bytes": 0,
    "smallest_bytes": 300,
    "predicted_total_bytes": 899,
    "stages": [
        {"name": "compress", "peak_rss_bytes": 2**28, "device_bytes": 0, "disk_bytes": 2**20, "seconds": 3.0}
    ],
    "fits": True,
    "advice": None,
    "machine_available_bytes": 2**30,
    "disk_free_bytes": 2**34,
    "asked_step_seconds": None,
    "fastest_step_seconds": None,
    "fastest_tokens_per_s": None,
}
PROBE = sample()["probe"]
EVALUATION = {"perplexity": 6.25, "tokens": 4096, "kl_mean": 0.0125, "kl_p99": 0.5, "top1_agreement": 0.93}
SPEED = {
    "prefill_tokens_per_s": 1234.0,
    "decode_tokens_per_s": 56.0,
    "load_seconds": 1.5,
    "bandwidth_fraction": 0.5,
    "peak_rss_bytes": 2**29,
    "paths": {"int4 planes": 7},
    "arithmetic_fraction": 0.25,
    "kernels": {
        phase: dict.fromkeys(
            ("norms", "attention_in", "rotary", "attention", "attention_out", "mlp_in", "activation"), 1e-4
        )
        | {"mlp_out": 2e-4, "head": 1e-4, "rest": 0.0}
        for phase in ("prefill", "decode")
    },
    "predicted": {"prefill_tokens_per_s": 1200.0, "decode_tokens_per_s": 58.0},
}
GENERATION = {"text": " world", "tokens": [5, 6], "seconds": 0.5}
EXPORT = {
    "format": "dense",
    "output": "out/dense",
    "kl_mean": 1e-5,
    "max_logit_difference": 0.01,
    "bytes_before": 2**20,
    "bytes_after": 2**22,
    "notes": ("scales were widened",),
}
DRAFT = {
    "output": "out/heads",
    "heads": 2,
    "acceptance": (0.5, 0.25),
    "tokens_per_step": 1.625,
    "text": "x.txt",
    "tokens": 4096,
    "parameters": 1000,
    "bytes": 4000,
    "seconds": 60.0,
}
TUNED = {
    "output": "out/adapter",
    "method": "lora",
    "loss_before": 2.5,
    "loss_after": 1.75,
    "steps": 1200,
    "best_step": 1080,
    "tokens_per_s": 1234.4,
    "peak_rss_bytes": 3 * 2**30,
    "trainable_parameters": 65536,
    "adapter_bytes": 2**18,
    "seconds": 200.0,
    "data": {"examples": 12, "tokens": 3400},
    "adapter": None,
    "merged": None,
    "score_before": None,
    "score_after": None,
    "scored": None,
    "report": "out/adapter/report.html",
    "warnings": [],
}
TUNE_PREVIEW = {
    "model": "m",
    "method": "lora",
    "data": {
        "examples": 12000,
        "tokens": 340000,
        "learned_tokens": 120000,
        "truncated": 7,
        "dropped": 5,
        "bad": 3,
        "longest": 512,
        "shape": "chat",
        "source": "train.jsonl",
        "fingerprint": "ab",
        "first_bad": (),
    },
    "rows": {"rows": 900, "waste": 0.0625, "steps": 113},
    "example": "example 1 of 12000: 9 tokens, 4 of them learned (>)\n  | [INST] hi⏎\n  > hello",
    "steps": 113,
    "trainable_parameters": 65536,
    "pass_tokens": 1024,
    "recomputed_blocks": 6,
    "predicted_peak_bytes": 2 * 2**30,
    "predicted_seconds": 3600.0,
    "why": ["examples don't share rows: the model's attention can't be replaced"],
}
SHARED = {
    "output": "out/shared",
    "rank": 8,
    "clusters": 2,
    "adapters": [{"name": "fr", "cluster": 0, "lost": 0.125}, {"name": "de", "cluster": 1, "lost": 0.0}],
    "bytes_before": 2**22,
    "bytes_after": 2**20,
}
MERGED = {
    "output": "out/merged",
    "loss_base": 3.5,
    "loss_adapter": 2.5,
    "loss_merged": 2.52,
    "gain_kept": 0.98,
    "kl_base": 0.9,
    "kl_mean": 0.004,
    "residual_rank": 2,
    "residual_adapter_bytes": 2**16,
    "tokens": 4096,
    "seconds": 60.0,
    "peak_rss_bytes": 2**29,
    "notes": ["measured on 6 of 60 documents"],
}
COMBINED = {
    "output": "out/both",
    "how": "ties",
    "weights": [0.5, 0.5],
    "rank": 8,
    "error": 0.125,
    "bytes": 2**20,
    "linears": [{"name": "layers.0.q", "rank": 8, "error": 0.25}],
}
COMPRESSED = {
    "output": "out/small",
    "density": 0.05,
    "alpha": 2.0,
    "entries": 1000,
    "kept": 50,
    "error": 0.5,
    "bytes_before": 2**20,
    "bytes_after": 2**14,
    "loss_adapter": 2.5,
    "loss_compressed": None,
}
EXPANDED = {"output": "out/again", "bytes": 2**20}
EXTRACTED = {
    "output": "out/tuned",
    "rank": 8,
    "kept": 0.75,
    "bytes": 2**20,
    "linears": [{"name": "layers.0.q", "rank": 8, "kept": 0.875}],
    "unchanged": 3,
    "others": ["norm.weight"],
}
SIGNED = {
    "output": "out/bits",
    "bytes_before": 2**24,
    "bytes_after": 2**20,
    "others": ["norm.weight"],
    "linears": [{"name": "layers.0.q", "scale": 0.0025, "error": 0.25}],
    "distilled": True,
    "kl_mean": 0.125,
    "kl_distilled": 0.0625,
    "tokens": 4096,
}
CELL = {
    "method": "gptq",
    "budget": "3.25bpw",
    "budget_bytes": 1000,
    "total_bytes": 990,
    "bits_per_weight": 3.2,
    "kl_mean": 0.0125,
    "perplexity_before": 6.0,
    "perplexity": 6.25,
    "top1_agreement": 0.93,
    "seconds": 60.0,
    "peak_rss_bytes": 2**29,
    "failure": None,
}
APPLIED = {"output": "out/dense", "bytes": 2**24}
SERVED = {"url": "http://127.0.0.1:8000", "seconds": 60.0, "generated_tokens": 1234, "restarts": 1}
BATCH = {
    "output": "out.jsonl",
    "requests": 9,
    "failed": 1,
    "resumed": 2,
    "generated_tokens": 1234,
    "seconds": 60.0,
}
FORMAT = {
    "name": "int3 g64",
    "bits_per_weight": 3.296875,
    "gaussian_error": 0.031,
    "capacity": 0.7768,
    "bound": 0.877,
    "ahead": False,
}
METHOD = {
    "name": "gptq",
    "family": "quantize",
    "kind": "linear method",
    "paper": "2210.17323",
    "needs": "Gram matrix",
    "fills": "integers",
    "cost": "1x gptq",
    "memory": "block",
}


def record(fields: dict[str, Any]) -> Any:
    """A dataclass with these fields, as the api returns them."""
    return make_dataclass("Result", fields)(**fields)


@dataclass
class FakeApi:
    """Answers per call (a value, an error to raise, or a function of the arguments), and the calls made."""

    answers: dict[str, Any] = field(
        default_factory=lambda: {
            "probe": record(PROBE),
            "fit": record(FIT),
            "compress": record(FIT),
            "compare": [record(CELL)],
            "evaluate": record(EVALUATION),
            "speed": record(SPEED),
            "generate": record(GENERATION),
            "tune": record(TUNED),
            "draft": record(DRAFT),
            "serve": record(SERVED),
            "share_adapters": record(SHARED),
            "merge_adapter": record(MERGED),
            "combine_adapters": record(COMBINED),
            "compress_adapter": record(COMPRESSED),
            "expand_adapter": record(EXPANDED),
            "extract_adapter": record(EXTRACTED),
            "make_bitdelta": record(SIGNED),
            "apply_bitdelta": record(APPLIED),
            "batch": record(BATCH),
            "export": record(EXPORT),
            "methods": [record(METHOD)],
            "formats": [record(FORMAT)],
        }
    )
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def function(self, name: str) -> Callable[..., Any]:
        """A function that takes exactly what the real one takes."""
        signature = inspect.signature(getattr(real_api, name))

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            self.calls.append((name, arguments))
            answer = self.answers[name]
            if isinstance(answer, BaseException):
                raise answer
            return answer(**arguments) if inspect.isfunction(answer) else answer

        return call

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the only call."""
        ((_, arguments),) = self.calls
        return arguments


@dataclass(frozen=True)
class Finished:
    """What a command line left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """The stand-in, in place of the real module."""
    fake, module = FakeApi(), ModuleType("tailorbird.api")
    for name in fake.answers:
        setattr(module, name, fake.function(name))
    monkeypatch.setitem(sys.modules, "tailorbird.api", module)
    monkeypatch.setattr(tailorbird, "api", module)
    return fake


@pytest.fixture
def dry_run() -> Any:
    """A dry run that fits."""
    return record(DRY_RUN)


@pytest.fixture
def tune_preview() -> Any:
    """What a dry run of `tune` returns."""
    return record(TUNE_PREVIEW)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run one command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str) -> Finished:
        status = run(arguments)
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return call
