"""Speed of what a tuning step does beside products on the CPU: norms, gates, attention, loss.

Forward and backward at 1,024 tokens, beside what transformers' modules make of the same, in turns; medians,
and how much faster. The loss has a frozen head of 32,000 tokens. MB are the most that a step holds beyond its
inputs, as PyTorch's profiler counts.

    python benchmarks/training_operations.py [--rounds 9] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from machine import add_quiet_option, require_quiet, write_result
from tailorbird.kernels import native
from tailorbird.kernels.training_attention import packed_attention
from tailorbird.kernels.training_gates import geglu, swiglu
from tailorbird.kernels.training_loss import chunked_cross_entropy
from tailorbird.kernels.training_norms import layer_norm, rms_norm

TOKENS, WIDTH, INNER, VOCABULARY, HEADS, HEAD_DIM = 1024, 768, 2048, 32000, 12, 64
CHUNK_BYTES = 16 << 20
EPS = 1e-5
SCALE = HEAD_DIM**-0.5

Run = Callable[..., Tensor]


class Subject:
    """An operation, its inputs that need a gradient, and the seconds of its steps."""

    def __init__(self, run: Run, *inputs: Tensor) -> None:
        self.run, self.inputs = run, [x.detach().requires_grad_() for x in inputs]
        self.seconds: list[float] = []
        y = run(*self.inputs)
        self.gradient = torch.randn_like(y) if y.dim() else torch.ones_like(y)

    def step(self) -> None:
        """Forward and backward."""
        began = time.perf_counter()
        torch.autograd.grad(self.run(*self.inputs), self.inputs, self.gradient)
        self.seconds.append(time.perf_counter() - began)

    def memory(self) -> int:
        """The most bytes that a step holds beyond its inputs."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            torch.autograd.grad(self.run(*self.inputs), self.inputs, self.gradient)
        held = most = 0
        for event in watched.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most


def rms_norm_of_modules(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' `LlamaRMSNorm`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def attention_of_modules(q: Tensor, k: Tensor, v: Tensor, examples: int) -> Tensor:
    """As transformers' models with "sdpa"."""
    heads = (x.unflatten(0, (examples, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(0, 1)


def loss_of_modules(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As transformers' causal models."""
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, targets, reduction="sum")


def operations(dtype: torch.dtype) -> dict[str, tuple[Subject, Subject]]:
    """Ours and theirs, by name."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, inner, heads = normal(TOKENS, WIDTH), normal(TOKENS, INNER), normal(TOKENS, HEADS, HEAD_DIM)
    keys, values = normal(TOKENS, HEADS, HEAD_DIM), normal(TOKENS, HEADS, HEAD_DIM)
    up, weight, bias = normal(TOKENS, INNER), normal(WIDTH), normal(WIDTH)
    vocabulary, targets = normal(VOCABULARY, WIDTH) / 30, torch.randint(VOCABULARY, (TOKENS,))
    ours = {
        "RMSNorm, frozen": Subject(lambda x: rms_norm(x, weight, EPS), x),
        "RMSNorm": Subject(lambda x, weight: rms_norm(x, weight, EPS), x, weight),
        "LayerNorm": Subject(lambda *inputs: layer_norm(*inputs, EPS), x, weight, bias),
        "SwiGLU": Subject(swiglu, inner, up),
        "GEGLU": Subject(geglu, inner, up),
        "attention, 4 x 256": Subject(lambda *x: packed_attention(*x, [256] * 4, SCALE), heads, keys, values),
        "attention, 1 x 1024": Subject(lambda *x: packed_attention(*x, [1024], SCALE), heads, keys, values),
        "loss": Subject(
            lambda x: chunked_cross_entropy(x, vocabulary, targets, chunk_bytes=CHUNK_BYTES), x
        ),
    }  # fmt: skip
    theirs = {
        "RMSNorm, frozen": Subject(lambda x: rms_norm_of_modules(x, weight), x),
        "RMSNorm": Subject(rms_norm_of_modules, x, weight),
        "LayerNorm": Subject(lambda *inputs: functional.layer_norm(inputs[0], [WIDTH], *inputs[1:], EPS), x,
                             weight, bias),
        "SwiGLU": Subject(lambda gate, up: functional.silu(gate) * up, inner, up),
        "GEGLU": Subject(lambda gate, up: functional.gelu(gate, approximate="tanh") * up, inner, up),
        "attention, 4 x 256": Subject(lambda *x: attention_of_modules(*x, 4), heads, keys, values),
        "attention, 1 x 1024": Subject(lambda *x: attention_of_modules(*x, 1), heads, keys, values),
        "loss": Subject(lambda x: loss_of_modules(x, vocabulary, targets), x),
    }  # fmt: skip
    return {name: (ours[name], theirs[name]) for name in ours}


def measure(ours: Subject, theirs: Subject, rounds: int) -> dict[str, Any]:
    """Medians of both, in turns, and what they hold."""
    for _ in range(rounds + 1):
        ours.step()
        theirs.step()
    seconds, other = (statistics.median(subject.seconds[1:]) for subject in (ours, theirs))
    return {
        "seconds": seconds, "modules_seconds": other, "speedup": other / seconds,
        "bytes": ours.memory(), "modules_bytes": theirs.memory(),
        "rounds": ours.seconds[1:], "modules_rounds": theirs.seconds[1:],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    assert native.available()
    title = f"{TOKENS} tokens, {arguments.dtype}, {torch.get_num_threads()} threads, forward and backward"
    table = Table("operation", "ms", "modules' ms", "faster", "MB", "modules' MB", title=title)
    found = []
    for name, subjects in operations(getattr(torch, arguments.dtype)).items():
        row = measure(*subjects, arguments.rounds)
        found.append({"operation": name, **row})
        times = (
            f"{1000 * row['seconds']:.2f}",
            f"{1000 * row['modules_seconds']:.2f}",
            f"{row['speedup']:.2f}",
        )
        table.add_row(name, *times, f"{row['bytes'] / 1e6:.1f}", f"{row['modules_bytes'] / 1e6:.1f}")
    Console().print(table)
    write_result(
        "training_operations",
        {"others_cores": busy, "dtype": arguments.dtype, "tokens": TOKENS, "operations": found},
    )  # fmt: skip


if __name__ == "__main__":
    main()
