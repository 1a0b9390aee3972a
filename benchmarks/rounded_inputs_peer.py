"""Rounding the inputs of linears: what it costs here, and what it costs in llama.cpp, with the same weights.

A trained Llama, whose rows consist of whole groups of 32, is rounded to symmetric groups with float16 scales,
which llama.cpp's Q4_0 and Q8_0 hold exactly, and exported to GGUF. Its logits with exact inputs (float32,
weights dequantized) are the reference; the KL from them is what rounded inputs add: in compiled blocks that
round every input, in those that round only the inputs which the plan allows, and in llama.cpp, which rounds
them all. Keys and values are float32.

    python benchmarks/rounded_inputs_peer.py LLAMA_CPP_PYTHON [--bits 4 8] [--windows 32]
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tailorbird
from fit_quality import ASSETS, SEQUENCES, Subject, subjects
from machine import write_result
from tailorbird.calibrate.text import held_out_windows, read_documents
from tailorbird.errors import GateRefused
from tailorbird.formats.modules import CompressedLinear
from tailorbird.model.load import load, load_tokenizer
from tailorbird.model.location import demo_text
from tailorbird.run.fused import FusedModel

LENGTH = 256
MODELS = ("demo", "python-7m")


def compress(subject: Subject, output: Path, bits: int) -> Path:
    """The model in groups that GGUF holds; the gate's opinion of its quality doesn't matter."""
    recipe = f"gptq:bits={bits},group=32,symmetric=true,scale_dtype=float16"
    try:
        result = tailorbird.compress(
            subject.model, output, recipe=recipe, calibration=subject.calibration,
            evaluation=subject.held_out, sequences=SEQUENCES, measure_speed=False, measure_spread=False,
        )  # fmt: skip
    except GateRefused as refusal:
        result = refusal.result  # type: ignore[attr-defined]
    return Path(result.output)


def windows_of(subject: Subject, count: int) -> Tensor:
    """Token ids ``[count, LENGTH]`` of held-out text."""
    tokenizer = load_tokenizer(subject.model)
    text = subject.held_out or subject.calibration or demo_text("held_out")
    documents = read_documents(Path(text), tokenizer)
    return held_out_windows(documents, tokenizer, LENGTH, count * LENGTH).ids


@torch.no_grad()
def blocks_logits(directory: Path, ids: Tensor, rounds: bool | None) -> Tensor:
    """Logits of compiled blocks with float32 keys and values; `rounds` None rounds what the plan allows."""
    model = load(directory, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, CompressedLinear) and rounds is not None:
            module.rounds = rounds
    fused = FusedModel(model)
    rows = []
    for window in ids:
        pages = fused.pages(1)
        pages.reach(len(window))
        positions = torch.arange(len(window), dtype=torch.int32)
        rows.append(
            fused.step(window, positions, torch.zeros_like(positions), pages, torch.arange(len(window)))
        )
    return torch.stack(rows)


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL in nats per token, in float64."""
    total = 0.0
    for ours, theirs in zip(reference, other, strict=True):
        p, q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(reference)


def measure(subject: Subject, bits: int, count: int, python: str, folder: Path) -> dict[str, Any]:
    """One model at one width."""
    directory = compress(subject, folder / "out", bits)
    ids = windows_of(subject, count)
    tailorbird.export(directory, "gguf", folder / "model.gguf")
    np.save(folder / "ids.npy", ids.numpy())
    script = Path(__file__).with_name("llama_cpp_model.py")
    done = subprocess.run(
        [python, str(script), "logits", str(folder / "model.gguf"), str(folder / "ids.npy"),
         str(folder / "logits.npy")],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    exact = blocks_logits(directory, ids, False)
    theirs = torch.from_numpy(np.load(folder / "logits.npy"))[..., : exact.shape[-1]]
    return {
        "model": subject.name, "bits": bits, "tokens": ids.numel(),
        "all_rounded": divergence(exact, blocks_logits(directory, ids, True)),
        "as_planned": divergence(exact, blocks_logits(directory, ids, None)),
        "llama_cpp": divergence(exact, theirs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("python", help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--name", default="rounded_inputs_peer", help="name of the result file")
    arguments = parser.parse_args()
    rows = []
    for subject in subjects(arguments.assets):
        for bits in arguments.bits if subject.name in arguments.only else ():
            with tempfile.TemporaryDirectory(prefix="rounded-inputs-") as folder:
                rows.append(measure(subject, bits, arguments.windows, arguments.python, Path(folder)))
                write_result(arguments.name, {"rows": rows})
    table = Table("model", "bits", "KL of all inputs rounded", "as planned", "llama.cpp")
    for row in rows:
        numbers = (f"{row[key]:.2e}" for key in ("all_rounded", "as_planned", "llama_cpp"))
        table.add_row(row["model"], str(row["bits"]), *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
