"""How fast a model reads a prompt and writes tokens on this machine, alone or against its source.

Each round reads one prompt of random tokens into an empty cache (prefill), then writes tokens one by one
(decode); medians over rounds are reported. Two models are measured in one process, round by round in turn, so
that what slows the machine down for a while slows both. A speed is worth quoting only from a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tailorbird.errors import ResourceError, SettingsError
from tailorbird.evaluate.foreseen import foresee
from tailorbird.formats.modules import CompressedLinear
from tailorbird.hardware.cost import decode_tokens_per_s
from tailorbird.hardware.memory import peak_resident_bytes, reset_peak
from tailorbird.hardware.probe import probe
from tailorbird.kernels.blocks import STEPS
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.progress import Progress
from tailorbird.run.fused import obstacle
from tailorbird.run.generate import Decoding, FusedDecoding, context_length, decode, likeliest
from tailorbird.run.parts import linear_shape

PROMPT_TOKENS = 64
NEW_TOKENS = 32
ROUNDS = 5

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Speed:
    """Speed of one model here.

    Attributes
    ----------
    prefill_tokens_per_s, decode_tokens_per_s : float
        Over all sequences of the batch together; medians over rounds.
    load_seconds : float
        From the path to a model in memory.
    bandwidth_fraction : float
        Bytes of weights that a decode step reads, times steps per second, over the machine's measured read
        bandwidth. Above 1 the weights come from a cache.
    peak_rss_bytes : int
        Most resident memory of this process while loading and running.
    paths : dict
        ``"<coding> · <path>"`` -> how many linears a decode step runs that way.
    arithmetic_fraction : float
        Operations per second of all products while the prompt is read, over the fastest rate that PyTorch's
        own products reach on this machine, in any type.
    kernels : dict or None
        ``prefill``, ``decode`` -> what the time went to -> seconds, of reading the prompt and of one step;
        None where the model doesn't run in compiled blocks.
    predicted : dict or None
        What the cost model says of ``prefill_tokens_per_s`` and ``decode_tokens_per_s``; None likewise.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    load_seconds: float
    bandwidth_fraction: float
    peak_rss_bytes: int
    paths: dict[str, int]
    arithmetic_fraction: float
    kernels: dict[str, dict[str, float]] | None
    predicted: dict[str, float] | None


@dataclass(frozen=True)
class SpeedComparison:
    """Speed of a result beside its source; tokens per second, medians over interleaved rounds.

    Attributes
    ----------
    ratio, prefill_ratio : float
        Result over source, decoding and reading the prompt.
    slower : bool
        The source decoded faster in every round.
    batch : int
        Sequences at once.
    predicted_decode_tokens_per_s : float or None
        Of the result, by the cost model; None where it doesn't run in compiled blocks.
    paths : dict
        Of the result, as in `Speed`.
    """

    source_prefill_tokens_per_s: float
    result_prefill_tokens_per_s: float
    prefill_ratio: float
    source_decode_tokens_per_s: float
    result_decode_tokens_per_s: float
    ratio: float
    slower: bool
    batch: int
    predicted_decode_tokens_per_s: float | None
    paths: dict[str, int]


def speed(
    model_path: str | Path,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    bits: int | None = None,
) -> Speed:
    """Measure one model.

    Parameters
    ----------
    model_path : str or Path
        A directory, a Hugging Face id, or ``demo``.
    prompt_tokens, new_tokens : int
        Tokens read and written per sequence.
    batch : int
        Sequences at once.
    threads : int, optional
        CPU threads; as many as PyTorch uses now, unless given.
    rounds : int
        Measured rounds, after one that isn't.
    bits : int, optional
        At which linears of 8 bits are read (`model.load.load`).

    Returns
    -------
    Speed

    Raises
    ------
    SettingsError
        A number below 1, or more tokens than the model's context.
    """
    _check_numbers(
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, rounds=rounds, threads=threads
    )
    open_checkpoint(str(model_path), bits)  # a mistake shows before the machine is measured
    with _threads(threads):
        machine = probe()
        reset_peak()
        start = time.perf_counter()
        subject = _Subject(model_path, prompt_tokens, new_tokens, batch, bits)
        load_seconds = time.perf_counter() - start
        subject.warm()
        for _ in range(rounds):
            subject.run()
        peak = peak_resident_bytes()
        kernels = subject.kernels()
        foreseen = foresee(subject.model, batch, prompt_tokens, new_tokens, progress)
    decode = subject.decode_tokens_per_s
    bound = decode_tokens_per_s(step_bytes(subject.model), machine, batch=batch)
    operations = 2 * product_weights(subject.model) * subject.prefill_tokens_per_s
    return Speed(
        prefill_tokens_per_s=subject.prefill_tokens_per_s,
        decode_tokens_per_s=decode,
        load_seconds=load_seconds,
        bandwidth_fraction=decode / bound,
        peak_rss_bytes=peak,
        paths=linear_paths(subject.model, batch),
        arithmetic_fraction=operations / max(rate for rate in machine.matmul.values() if rate is not None),
        kernels=kernels,
        predicted=None if foreseen is None else asdict(foreseen),
    )


def compare_speed(
    source: str | Path,
    result: str | Path,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = ROUNDS,
) -> SpeedComparison:
    """Measure two models in turns; parameters and errors as in `speed`. Both are in memory at once."""
    _check_numbers(
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, rounds=rounds, threads=threads
    )
    with _threads(threads):
        before, after = (_Subject(path, prompt_tokens, new_tokens, batch) for path in (source, result))
        for subject in (before, after):
            subject.warm()
        for number in range(rounds):
            for subject in (before, after) if number % 2 == 0 else (after, before):
                subject.run()
        foreseen = foresee(after.model, batch, prompt_tokens, new_tokens)
    pairs = zip(before.decode_seconds, after.decode_seconds, strict=True)
    return SpeedComparison(
        source_prefill_tokens_per_s=before.prefill_tokens_per_s,
        result_prefill_tokens_per_s=after.prefill_tokens_per_s,
        prefill_ratio=after.prefill_tokens_per_s / before.prefill_tokens_per_s,
        source_decode_tokens_per_s=before.decode_tokens_per_s,
        result_decode_tokens_per_s=after.decode_tokens_per_s,
        ratio=after.decode_tokens_per_s / before.decode_tokens_per_s,
        slower=all(source < result for source, result in pairs),
        batch=batch,
        predicted_decode_tokens_per_s=None if foreseen is None else foreseen.decode_tokens_per_s,
        paths=linear_paths(after.model, batch),
    )


def compare_in_child(source: str | Path, result: str | Path, batch: int = 1) -> dict[str, Any]:
    """`compare_speed` in a process of its own, whose memory and caches are not this one's.

    Models with a short context are measured with as many tokens as it holds.

    Returns
    -------
    dict
        Fields of `SpeedComparison`.

    Raises
    ------
    ResourceError
        The process was killed, as happens when memory runs out.
    RuntimeError
        It failed otherwise.
    """
    command = [sys.executable, "-m", __name__, str(source), str(result)]
    command += ["--batch", str(batch), "--threads", str(torch.get_num_threads())]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode < 0:
        raise ResourceError(
            f"the process that measures speed was killed by signal {-child.returncode}",
            "memory for source and result together",
            "free some memory and run the same command again",
        )
    if child.returncode:
        raise RuntimeError(f"measuring speed failed:\n{child.stderr.strip()[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def step_bytes(model: nn.Module) -> int:
    """Bytes of stored weights that one decode step reads, whatever the batch.

    Embeddings are looked up row by row and don't count, except where the head shares their tensor.
    """
    tensors: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            stored = list(module.packed().tensors.values())
        elif isinstance(module, nn.Embedding):
            continue
        else:
            stored = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        tensors.update((tensor.data_ptr(), tensor.nbytes) for tensor in stored)
    return sum(tensors.values())


def product_weights(model: nn.Module) -> int:
    """Weights of all linears of the blocks, by which each token of a prompt is multiplied."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D))
    return sum(math.prod(linear_shape(module)) for module in linears if module is not head)


def linear_paths(model: Any, rows: int) -> dict[str, int]:
    """``"<coding> · <path>"`` -> number of linears, for `rows` rows of activations in the model's dtype.

    Inside compiled blocks a path is called fused.
    """
    from transformers.pytorch_utils import Conv1D

    found: Counter[str] = Counter()
    fused = obstacle(model) is None
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            path = module.path(rows, model.dtype)
            if fused:
                turned = "" if module.transform is None else f"{module.transform.word} "
                path = f"{turned}fused {'int8' if module.rounds else 'float'}"
            found[f"{module.coding.label} · {path}"] += 1
        elif isinstance(module, nn.Linear | Conv1D):
            dtype = module.weight.dtype
            found[f"{_SHORT.get(dtype, str(dtype))} · {'fused dense' if fused else 'dense'}"] += 1
    return dict(sorted(found.items()))


class _Subject:
    """A loaded model, the prompt that it reads, and how long its rounds took."""

    def __init__(
        self, path: str | Path, prompt_tokens: int, new_tokens: int, batch: int, bits: int | None = None
    ) -> None:
        self.model = load(path, bits=bits)
        context = context_length(self.model)
        if context is not None and prompt_tokens + new_tokens > context:
            raise SettingsError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones",
                f"at most {context} together, the context of {path}",
                "use fewer --prompt-tokens or --new-tokens",
            )
        vocabulary = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=generator)
        self.new_tokens = new_tokens
        self.prefill_seconds: list[float] = []
        self.decode_seconds: list[float] = []

    def _decoding(self) -> Decoding:
        return decode(self.model, self.prompt.shape[1] + self.new_tokens)

    def warm(self) -> None:
        """Read the prompt and a token once, so that kernels are built and layouts made."""
        decoding = self._decoding()
        decoding.read(self.prompt)
        decoding.read(self.prompt[:, :1])

    def run(self) -> None:
        """One measured round."""
        decoding = self._decoding()
        start = time.perf_counter()
        logits = decoding.read(self.prompt)
        read = time.perf_counter()
        for _ in range(self.new_tokens):
            logits = decoding.read(likeliest(logits)[:, None])
        self.prefill_seconds.append(read - start)
        self.decode_seconds.append(time.perf_counter() - read)

    def kernels(self) -> dict[str, dict[str, float]] | None:
        """Seconds by what they went to, in one more round; None outside of compiled blocks."""
        decoding = self._decoding()
        if not isinstance(decoding, FusedDecoding):
            return None
        found = {}
        fed, steps = self.prompt, 1
        for phase in ("prefill", "decode"):
            seconds = decoding.model.seconds = torch.zeros(len(STEPS) + 1, dtype=torch.float64)
            start = time.perf_counter()
            for _ in range(steps):
                fed = likeliest(decoding.read(fed))[:, None]
            elapsed = time.perf_counter() - start
            parts = {
                name: float(value) / steps for name, value in zip((*STEPS, "head"), seconds, strict=True)
            }
            found[phase] = parts | {"rest": elapsed / steps - sum(parts.values())}
            steps = self.new_tokens
        return found

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt.numel() / statistics.median(self.prefill_seconds)

    @property
    def decode_tokens_per_s(self) -> float:
        return len(self.prompt) * self.new_tokens / statistics.median(self.decode_seconds)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise SettingsError(
                f"{option} {value}", "a whole number of at least 1", f"give {option} 1 or more"
            )


def _main() -> None:
    """The process behind `compare_in_child`: prints one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("result")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    context = context_length(open_checkpoint(given.source)) or PROMPT_TOKENS + NEW_TOKENS
    prompt_tokens = max(1, min(PROMPT_TOKENS, context * 2 // 3))
    new_tokens = max(1, min(NEW_TOKENS, context - prompt_tokens))
    found = compare_speed(
        given.source, given.result, prompt_tokens, new_tokens, batch=given.batch, threads=given.threads
    )
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    _main()
