"""Many adapters in one batch: what it costs beside the base alone, and beside what it must cost.

A random 110 M Llama at 4 bits with 1,000 registered random LoRA adapters, ranks 8, 16, 32 and 64 in turn. 64
sequences decode at once: without adapters, with 64 different ones on the query and value projections, with 64
different ones on all linears, with adapters drawn from a Zipf distribution, with adapters of 8 bits, and with
64 adapters in one basis of rank 64 that they share. The bound is the base's step
and the adapters' bytes at the read bandwidth of this run. PEFT's batch of mixed adapters (`adapter_names`,
the same adapters on the bf16 model) runs beside them. Last, the time to the first token of a request for an
adapter that nobody has used yet, on an idle engine, after a prompt of 32 tokens.

    python benchmarks/serve_adapters.py [--registered 1000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from cpu_speed import GROUP, SIZES, read_bandwidth
from machine import add_quiet_option, require_quiet, write_result
from packed_models import round_plainly
from random_models import write_random
from tailorbird.serve.adapters.share import share

RANKS = (8, 16, 32, 64)
SEQUENCES, PROMPT, NEW = 64, 32, 32
TARGETS = {
    "q and v": ("self_attn.q_proj", "self_attn.v_proj"),
    "all linears": (
        *(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ),
}  # fmt: skip
#: Exponent of the distribution of requests over adapters.
ZIPF = 1.0


def write_adapter(
    folder: Path, source: Path, rank: int, targets: Sequence[str], seed: int, deviation: float = 0.02
) -> Path:
    """A random LoRA adapter in PEFT's layout; `deviation` is that of each of its numbers."""
    config = json.loads((source / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width)}
    shapes |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for block in range(config["num_hidden_layers"]):
        for target in targets:
            out, n = shapes[target.split(".")[1].removesuffix("_proj")]
            prefix = f"base_model.model.model.layers.{block}.{target}"
            for part, shape in (("lora_A", (rank, n)), ("lora_B", (out, rank))):
                noise = torch.randn(shape, generator=generator, dtype=torch.float32) * deviation
                tensors[f"{prefix}.{part}.weight"] = noise.bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
                "target_modules": sorted({target.split(".")[1] for target in targets}), "bias": "none",
                "base_model_name_or_path": str(source),
            }
        )
    )  # fmt: skip
    return folder


class Engine:
    """An engine whose sequences decode together."""

    def __init__(self, model: Path, adapter_bits: int | None = None) -> None:
        from tailorbird.serve.engine import Engine as Served
        from tailorbird.serve.interface import EngineOptions

        options = EngineOptions(
            str(model), max_sequences=SEQUENCES, speculative=False, adapter_bits=adapter_bits
        )
        self.engine = Served(options, log=lambda _: None)
        self.requests = 0

    def decode_seconds(self, adapters: Sequence[str | None]) -> float:
        """Of a step in which each sequence, with the adapter of its own, gets a token."""
        from tailorbird.serve.request import Request, Sampling

        rng = random.Random(self.requests)
        for adapter in adapters:
            self.requests += 1
            prompt = tuple(rng.randrange(3, 32_000) for _ in range(PROMPT))
            sampling = Sampling(temperature=0, ignore_end=True)
            self.engine.add(Request(str(self.requests), prompt, NEW + 40, sampling, adapter=adapter))
        scheduler = self.engine.scheduler
        while scheduler.waiting or any(one.pending > 1 for one in scheduler.running):
            self.engine.step()
        seconds = []
        for _ in range(NEW):
            began = time.perf_counter()
            self.engine.step()
            seconds.append(time.perf_counter() - began)
        while self.engine.busy:
            self.engine.step()
        return statistics.median(seconds)

    def first_token_seconds(self, adapter: str) -> float:
        """From a request for an adapter to its first token."""
        from tailorbird.serve.request import Request, Sampling

        self.requests += 1
        prompt = tuple(random.Random(self.requests).randrange(3, 32_000) for _ in range(PROMPT))
        began = time.perf_counter()
        self.engine.add(Request(str(self.requests), prompt, 1, Sampling(temperature=0), adapter=adapter))
        while self.engine.busy:
            self.engine.step()
        return time.perf_counter() - began


class Peft:
    """PEFT's batch of mixed adapters on the bf16 model."""

    def __init__(self, source: Path, folders: Sequence[Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        self.names = [f"a{number}" for number in range(len(folders))]
        self.model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="a0")
        for name, folder in zip(self.names[1:], folders[1:], strict=True):
            self.model.load_adapter(str(folder), adapter_name=name)
        self.model.eval()

    @torch.no_grad()
    def decode_seconds(self, steps: int = 4) -> float:
        """Of a step of as many sequences as there are adapters."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        ids = torch.randint(3, 32_000, (len(self.names), PROMPT))
        seconds = []
        for _ in range(steps + 1):
            began = time.perf_counter()
            output = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1,
                adapter_names=self.names,
            )  # fmt: skip
            ids = output.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
    parser.add_argument("--name", default="serve_adapters", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    console, bandwidth = Console(), read_bandwidth()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="serve-adapters-") as name:
        folder = Path(name)
        source = write_random(SIZES["110M"], folder / "source", context=1024)
        engine = Engine(round_plainly(source, folder / "4-bits", 4, GROUP))
        for number in range(arguments.registered):
            path = write_adapter(
                folder / "qv" / str(number), source, RANKS[number % 4], TARGETS["q and v"], number
            )
            engine.engine.adapters_of_model().register(f"qv{number}", path)
        for number in range(SEQUENCES):
            path = write_adapter(
                folder / "all" / str(number), source, RANKS[number % 4], TARGETS["all linears"], number
            )
            engine.engine.adapters_of_model().register(f"all{number}", path)
        rounded = Engine(folder / "4-bits", adapter_bits=8)
        for kind in ("qv", "all"):
            for number in range(SEQUENCES):
                rounded.engine.adapters_of_model().register(f"{kind}{number}", folder / kind / str(number))
        members = [folder / "qv" / str(number) for number in range(SEQUENCES)]
        share(engine.engine.runner.model.linears, members, folder / "shared", rank=max(RANKS))
        for number in range(SEQUENCES):
            engine.engine.adapters_of_model().register(f"shared{number}", folder / "shared" / str(number))
        rng = random.Random(0)
        shares = [1 / (rank + 1) ** ZIPF for rank in range(arguments.registered)]
        batches: dict[str, list[str | None]] = {
            "base": [None] * SEQUENCES,
            "64 adapters, q and v": [f"qv{number}" for number in range(SEQUENCES)],
            "64 adapters, all linears": [f"all{number}" for number in range(SEQUENCES)],
            "Zipf, q and v": [
                f"qv{number}" for number in rng.choices(range(arguments.registered), shares, k=SEQUENCES)
            ],
            "64 adapters, q and v, 8 bits": [f"qv{number}" for number in range(SEQUENCES)],
            "64 adapters, all linears, 8 bits": [f"all{number}" for number in range(SEQUENCES)],
            "64 adapters, q and v, one basis": [f"shared{number}" for number in range(SEQUENCES)],
        }
        of_batch = {name: rounded if name.endswith("8 bits") else engine for name in batches}
        seconds: dict[str, list[float]] = {name: [] for name in batches}
        for number in range(arguments.rounds + 1):
            for name, batch in batches.items():
                found = of_batch[name].decode_seconds(batch)
                if number:  # the first round warms up, and reads the adapters
                    seconds[name].append(found)
        cold = [
            engine.first_token_seconds(f"qv{number}")
            for number in range(arguments.registered - 1, arguments.registered - 1 - 20, -1)
        ]
        base = statistics.median(seconds["base"])
        for name, batch in batches.items():
            size = _bytes(of_batch[name].engine.adapters_of_model(), set(batch) - {None})
            taken, bound = statistics.median(seconds[name]), base + size / bandwidth
            rows.append(
                {
                    "batch": name, "adapters": len(set(batch) - {None}), "adapter_bytes": size,
                    "step_seconds": taken, "tokens_per_s": SEQUENCES / taken, "of_base": base / taken,
                    "of_bound": bound / taken, "rounds": seconds[name],
                }
            )  # fmt: skip
        peft = {}
        for kind in () if arguments.no_peft else ("qv", "all"):
            mixed = Peft(source, [folder / kind / str(number) for number in range(SEQUENCES)])
            peft[kind] = SEQUENCES / statistics.median(mixed.decode_seconds() for _ in range(3))
    table = Table("batch", "adapters", "MB", "step ms", "tokens/s", "of base", "of bound")
    for row in rows:
        table.add_row(
            row["batch"], str(row["adapters"]), f"{row['adapter_bytes'] / 1e6:.0f}",
            f"{1e3 * row['step_seconds']:.1f}", f"{row['tokens_per_s']:.0f}", f"{row['of_base']:.0%}",
            f"{row['of_bound']:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(f"first token with a cold adapter: {1e3 * statistics.median(cold):.0f} ms; PEFT: {peft}")
    write_result(
        arguments.name,
        {
            "others_cores": busy, "read_bandwidth": bandwidth, "registered": arguments.registered,
            "rows": rows, "cold_first_token_seconds": cold, "peft_tokens_per_s": peft,
        },
    )  # fmt: skip


def _bytes(store: Any, names: set[str]) -> int:
    """What adapters take in memory; what they share counts once."""
    handles = [store.acquire(name) for name in names]
    try:
        shared = {key: size for handle in handles for key, size in handle.adapter.shared.items()}
        own = sum(handle.adapter.nbytes - sum(handle.adapter.shared.values()) for handle in handles)
        return int(own + sum(shared.values()))
    finally:
        for handle in handles:
            store.release(handle)


if __name__ == "__main__":
    main()
