"""Attention over pages against PyTorch's attention over keys and values in one piece, on the CPU.

A model of one block reads tokens whose context is in shuffled pages; the block's own clock says what its
attention took, apart from projections, rotary angles and writing the cache. In turn with it,
`torch.nn.functional.scaled_dot_product_attention` takes as many queries over contiguous keys and values of
the same dtype: for decoding with the queries of a group as rows of one head, for a whole prompt as causal,
each its fastest form, and for a chunk after others with a mask. Decoding: 1, 8 and 16 sequences; reading: the
last 512 tokens of a context. Heads of 64 and 128, one and four query heads for each key head, float32 and
bfloat16 as the engine stores them. Medians; the goal is a ratio of SDPA's time to that of pages of at least
0.85.

    python benchmarks/paged_attention.py [--threads 2] [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from machine import add_quiet_option, require_quiet, write_result
from tailorbird.kernels.blocks import PAGE, STEPS
from tailorbird.run.fused import FusedModel
from tailorbird.run.pages import SharedPages

GOAL = 0.85
HEADS, CHUNK = 8, 512
BATCHES, CONTEXTS, HEAD_SIZES, GROUPS = (1, 8, 16), (512, 2048, 8192), (64, 128), (1, 4)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What is read: so many `tokens` of each of `batch` sequences, the last ones of `context`."""

    batch: int
    tokens: int
    context: int
    head_size: int
    group: int
    dtype: str

    @property
    def kind(self) -> str:
        return f"decode {self.batch}" if self.tokens == 1 else f"read {self.tokens}"


def cases(quick: bool) -> list[Case]:
    """All that are timed; a few of them where `quick`."""
    contexts = CONTEXTS[:1] if quick else CONTEXTS
    reads = [(batch, 1) for batch in (BATCHES[:2] if quick else BATCHES)] + [(1, CHUNK)]
    each = itertools.product(reads, contexts, HEAD_SIZES, GROUPS, DTYPES)
    return [Case(*read, *rest) for read, *rest in each]


def over_pages(case: Case) -> Callable[[], float]:
    """A call that reads the tokens once, and tells the seconds of its attention."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=HEADS * case.head_size, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // case.group, head_dim=case.head_size,
        max_position_embeddings=max(CONTEXTS), dtype=DTYPES[case.dtype],
    )  # fmt: skip
    model = FusedModel(LlamaForCausalLM(config).to(DTYPES[case.dtype]).eval())
    of_sequence = -(-case.context // PAGE)
    cache = SharedPages(model.page_shapes, model.cache_dtype, case.batch * of_sequence)
    assert model.cache_dtype == DTYPES[case.dtype]
    for pool in (*cache.keys, *cache.values):
        pool.normal_()
    cache.tables = torch.randperm(case.batch * of_sequence).int().view(case.batch, of_sequence)
    positions = torch.arange(case.context - case.tokens, case.context).int().repeat(case.batch)
    sequences = torch.arange(case.batch).int().repeat_interleave(case.tokens)
    hidden = torch.randn(len(positions), model.width)
    seconds = model.seconds = torch.zeros(len(STEPS) + 1, dtype=torch.float64)
    attention = STEPS.index("attention")

    def timed() -> float:
        seconds.zero_()
        model.run(hidden, positions, sequences, cache)
        return float(seconds[attention])

    return timed


def in_one_piece(case: Case) -> Callable[[], float]:
    """A call of PyTorch's attention on the same lengths, and its seconds."""

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DTYPES[case.dtype])

    kv_heads, mask = HEADS // case.group, None
    keys, values = (tensor(case.batch, kv_heads, case.context, case.head_size) for _ in range(2))
    if case.tokens == 1:
        queries = tensor(case.batch, kv_heads, case.group, case.head_size)
    else:
        queries = tensor(case.batch, HEADS, case.tokens, case.head_size)
        if case.tokens < case.context:
            last = torch.arange(case.context - case.tokens, case.context)
            mask = torch.arange(case.context) <= last[:, None]
    causal = case.tokens == case.context
    grouped = queries.shape[1] != kv_heads

    def timed() -> float:
        began = time.perf_counter()
        scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
        return time.perf_counter() - began

    return timed


@torch.no_grad()
def run(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of both, and their ratio."""
    ways = {"pages": over_pages(case), "sdpa": in_one_piece(case)}
    for way in ways.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            taken[name].append(way())
    found = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return asdict(case) | found | {"ratio": found["sdpa"] / found["pages"], "rounds": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a few cases, nothing kept")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    cores = require_quiet(arguments.even_if_busy)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found = [run(case, arguments.rounds) for case in cases(arguments.quick)]
    table = Table("what", "context", "head", "group", "dtype", "pages ms", "SDPA ms", "ratio")
    for case, one in zip(cases(arguments.quick), found, strict=True):
        table.add_row(
            case.kind, str(case.context), str(case.head_size), str(case.group), case.dtype,
            f"{1e3 * one['pages']:.3f}", f"{1e3 * one['sdpa']:.3f}", f"{one['ratio']:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    reached = sum(one["ratio"] >= GOAL for one in found)
    console.print(f"{reached} of {len(found)} reach {GOAL}; least {min(one['ratio'] for one in found):.2f}")
    if not arguments.quick:
        data = {"heads": HEADS, "goal": GOAL, "reached": reached, "others_cores": cores, "cases": found}
        console.print(f"written to {write_result('paged_attention', data)}")


if __name__ == "__main__":
    main()
