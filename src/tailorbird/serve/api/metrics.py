"""What is counted, in Prometheus' words (https://prometheus.io/docs/practices/naming)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tailorbird.serve.api.departures import Departures
from tailorbird.serve.request import Output

#: The engine's own numbers: name -> (name here, kind, what it is).
ENGINE_STATS = {
    "waiting": ("tailorbird_requests_waiting", "gauge", "Sequences that wait in the engine's queue"),
    "compiling": ("tailorbird_requests_compiling", "gauge", "Requests that wait for their grammars"),
    "running": ("tailorbird_requests_running", "gauge", "Sequences in the engine's batch"),
    "kv_pages": ("tailorbird_kv_pages", "gauge", "Pages for keys and values"),
    "kv_pages_used": ("tailorbird_kv_pages_used", "gauge", "Pages for keys and values in use"),
    "adapter_pages": ("tailorbird_adapter_pages", "gauge", "Pages whose memory adapters have"),
    "step_tokens": ("tailorbird_step_tokens", "gauge", "Tokens of the engine's last step"),
    "memory_bytes": ("tailorbird_engine_memory_bytes", "gauge", "Resident memory of the engine's process"),
    "cached_tokens": (
        "tailorbird_cached_tokens",
        "counter",
        "Tokens of prompts that needn't be read",
    ),
    "preemptions": ("tailorbird_preemptions", "counter", "Sequences that lost their pages to others"),
    "swap_pages": ("tailorbird_swap_pages", "gauge", "Copies of pages in the swap"),
    "swapped_out_pages": ("tailorbird_swapped_out_pages", "counter", "Pages copied to the swap"),
    "swapped_out_bytes": ("tailorbird_swapped_out_bytes", "counter", "Bytes copied to the swap"),
    "swapped_in_pages": ("tailorbird_swapped_in_pages", "counter", "Pages read back from the swap"),
    "swapped_in_bytes": ("tailorbird_swapped_in_bytes", "counter", "Bytes read back from the swap"),
    "swap_damaged_pages": (
        "tailorbird_swap_damaged_pages",
        "counter",
        "Pages that came back damaged from the swap, and were computed again",
    ),
    "steps": ("tailorbird_steps", "counter", "Steps of the engine since it was started"),
}
#: Numbers of each guesser, whose names follow these fields and a slash.
GUESSER_STATS = {
    "drafted_tokens": ("tailorbird_drafted_tokens", "Guessed tokens that were checked"),
    "accepted_tokens": ("tailorbird_accepted_tokens", "Guessed tokens that were right"),
}
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The numbers of one server, in a registry of their own.

    Parameters
    ----------
    stats : callable
        The engine's numbers as they are now; those of `ENGINE_STATS` are shown.
    ready : callable
        Whether it takes requests.
    restarts : callable
        How often it was started again.
    """

    def __init__(
        self,
        stats: Callable[[], Mapping[str, float]],
        ready: Callable[[], bool],
        restarts: Callable[[], int],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self.first_token = Histogram(
            "tailorbird_time_to_first_token_seconds", "From arrival to the first token", buckets=_FIRST,
            registry=registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "tailorbird_inter_token_latency_seconds", "From one token to the next", buckets=_BETWEEN,
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "tailorbird_request_seconds", "From arrival to the end of the answer", ["route"], buckets=_WHOLE,
            registry=registry,
        )  # fmt: skip
        self.requests = Counter(
            "tailorbird_requests", "HTTP requests by route and status", ["route", "status"], registry=registry
        )
        self.finished = Counter(
            "tailorbird_finished", "Continuations by how they ended", ["outcome"], registry=registry
        )
        self.adapters = Counter(
            "tailorbird_adapter_requests", "Requests by adapter", ["adapter"], registry=registry
        )
        self.prompt_tokens = Counter("tailorbird_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generated_tokens = Counter("tailorbird_generated_tokens", "Tokens written", registry=registry)
        self.generated = 0
        self.departures = Departures()
        registry.register(_EngineNumbers(stats, ready, restarts))

    def ended(self, outcome: str) -> None:
        """Count one continuation."""
        self.departures.ended()
        self.finished.labels(outcome).inc()

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count one HTTP request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def submitted(self, tokens: int, adapter: str | None) -> None:
        """Count one prompt."""
        self.prompt_tokens.inc(tokens)
        if adapter is not None:
            self.adapters.labels(adapter).inc()

    def clock(self, arrived: float) -> Callable[[Output], None]:
        """What takes the times of one client's outputs, as they come.

        Parameters
        ----------
        arrived : float
            When the request did, in seconds of the monotonic clock.
        """
        last: dict[tuple[str, int], float] = {}

        def observe(output: Output) -> None:
            now, key, count = time.monotonic(), (output.id, output.index), len(output.tokens)
            if not count:
                return
            if key in last:
                for _ in range(count):
                    self.between_tokens.observe((now - last[key]) / count)
            else:
                self.first_token.observe(now - arrived)
            last[key] = now
            self.generated_tokens.inc(count)
            self.generated += count

        return observe

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)


class _EngineNumbers(Collector):
    """The engine's own numbers, asked for when somebody looks."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, float]],
        ready: Callable[[], bool],
        restarts: Callable[[], int],
    ) -> None:
        self._stats = stats
        self._ready = ready
        self._restarts = restarts

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        yield GaugeMetricFamily("tailorbird_ready", "Whether the engine takes requests", int(self._ready()))
        yield CounterMetricFamily(
            "tailorbird_engine_restarts", "How often the engine was started again", self._restarts()
        )
        stats = self._stats()
        for field, (name, kind, text) in ENGINE_STATS.items():
            if field in stats:
                family: Any = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
                yield family(name, text, stats[field])
        for field, (name, text) in GUESSER_STATS.items():
            counter = CounterMetricFamily(name, text, labels=["guesser"])
            for key, value in stats.items():
                if key.startswith(f"{field}/"):
                    counter.add_metric([key.removeprefix(f"{field}/")], value)
            yield counter
