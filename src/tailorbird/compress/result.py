"""What `fit` and `compress` return; the fields are those of their JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FitResult:
    """What `fit` and `compress` return, and print with ``--json``; bytes, seconds, nats."""

    output: str
    budget_bytes: int | None
    total_bytes: int
    weight_bytes: int
    kv_bytes: int
    bits_per_weight: float
    perplexity_before: float | None
    perplexity_after: float | None
    kl_mean: float | None
    kl_p99: float | None
    top1_agreement: float | None
    predicted: dict[str, Any]
    seconds: float
    peak_rss_bytes: int
    accepted: bool
    checks: list[dict[str, Any]]
    speed: dict[str, Any] | None = None
    report: str | None = None
    methods: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DryRun:
    """What is known before any weight is read; bytes and seconds.

    `asked_step_seconds` is what a decoding step may take, where a speed is asked for; the two after it are of
    the fastest plan within the budget, where the kernels of this machine are timed already.
    """

    model: str
    method: str
    parameters: int
    dense_bytes: int
    budget_bytes: int | None
    kv_bytes: int
    smallest_bytes: int
    predicted_total_bytes: int
    stages: list[dict[str, Any]]
    fits: bool
    advice: str | None
    machine_available_bytes: int
    disk_free_bytes: int
    asked_step_seconds: float | None = None
    fastest_step_seconds: float | None = None
    fastest_tokens_per_s: float | None = None
