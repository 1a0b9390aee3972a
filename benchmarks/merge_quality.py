"""What survives of an adapter in packed weights: rounded to nearest, merged, with a residual adapter.

Each model is packed with `gptq` at 8, 4, 3 and 2 bits (groups of 64, with zero points; embedding and head
stay). On each of these a LoRA of rank 8 over all linears is trained, briefly, on web text that the models, of
program source, haven't seen. It is merged, and the share of its gain that survives is measured on others:

- rounded to nearest: every changed linear's target, on new grids with the clip search,
- merged: as `adapters merge` does, calibrated with the text that the adapter was trained on,
- with a residual adapter of rank 8.

Bytes are the most that the process held while the adapter was trained by PEFT, and while it was merged, which
is a process for each model and width.

    python benchmarks/merge_quality.py [--assets DIR] [--bits N ...] [--steps N] [--processes N]
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table

from fit_quality import ASSETS
from machine import write_result
from tailorbird.adapt.merge.adapted import AdaptedModel
from tailorbird.adapt.merge.adapter import LoraAdapter
from tailorbird.adapt.merge.gate import Survival, measure
from tailorbird.adapt.merge.merge import MANIFEST, merge_adapter
from tailorbird.adapt.merge.pipeline import stored_weight
from tailorbird.calibrate.job import Job
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.calibrate.text import held_out_windows, read_documents, token_windows
from tailorbird.compress.compression import Compression
from tailorbird.compress.pipeline import Pipeline
from tailorbird.errors import GateRefused
from tailorbird.evaluate.checkpoint import HELD_OUT_TOKENS
from tailorbird.formats.packed import IntegerCoding
from tailorbird.hardware.memory import peak_resident_bytes, reset_peak, trim_heap
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import demo_text, open_checkpoint, write_tensors
from tailorbird.model.load import load, load_tokenizer
from tailorbird.progress import Silent

BITS = (8, 4, 3, 2)
GROUP, RANK, LENGTH, BATCH, LEARNING_RATE = 64, 8, 128, 4, 2e-3
SEQUENCES = 96  # of calibration
#: documents to train on, and others to measure on
TRAINED, MEASURED = 200, 8
#: models of program source, and text like that which they learned from
MODELS = {"demo": "", "python-7m": "python-calibration/calibration.txt"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with models/ and data/")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--steps", type=int, default=30, help="of training each adapter")
    parser.add_argument("--processes", type=int, default=2, help="models that are worked on at a time")
    arguments = parser.parse_args()
    names = [name for name in MODELS if name == "demo" or (arguments.assets / "models" / name).exists()]
    jobs = [(name, bits, arguments.steps, arguments.assets) for name in names for bits in arguments.bits]
    settings = {
        "group_size": GROUP, "lora_rank": RANK, "steps": arguments.steps, "batch": BATCH, "length": LENGTH,
        "learning_rate": LEARNING_RATE, "text": "data/c4", "trained_documents": TRAINED,
        "measured_documents": MEASURED,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(row_of, *job) for job in jobs]):
            rows.append(done.result())
            rows.sort(key=lambda row: (row["model"], -row["bits"]))
            path = write_result("merge_quality", {"settings": settings, "rows": rows})
            print(json.dumps(done.result()), flush=True)
    show(rows)
    print(path)


def row_of(name: str, bits: int, steps: int, assets: Path) -> dict[str, Any]:
    """What survives in one model."""
    torch.set_num_threads(1)
    source, calibration = name, demo_text("calibration")
    if name != "demo":
        source, calibration = str(assets / "models" / name), assets / "data" / MODELS[name]
    with tempfile.TemporaryDirectory(prefix="tailorbird-merge-") as folder:
        place = Path(folder)
        trained, measured = texts(assets, place)
        base = pack(source, calibration, place / "base", bits)
        begin_peak()
        adapter = train(base, trained, place / "lora", steps)
        peak = peak_resident_bytes()
        found = compare(base, adapter, trained, measured, place)
        return {"model": name, "bits": bits, "tuning_peak_bytes": peak, **found}


def begin_peak() -> None:
    """Let the peak be that of what follows, as far as the heap gives back what was freed."""
    trim_heap()
    reset_peak()


def texts(assets: Path, folder: Path) -> tuple[Path, Path]:
    """Web documents to train and calibrate on, and others to measure on."""
    with gzip.open(assets / "data/c4/c4-300.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = file.read().strip().split("\n")
    files = folder / "trained.jsonl", folder / "measured.jsonl"
    for path, part in zip(files, (lines[:TRAINED], lines[-MEASURED:]), strict=True):
        path.write_text("\n".join(part), encoding="utf-8")
    return files


def pack(source: str, calibration: Path, output: Path, bits: int) -> Path:
    """`source` with every linear of its blocks rounded by `gptq`."""
    checkpoint = open_checkpoint(source)
    anatomy = read_anatomy(checkpoint)
    tokenizer = checkpoint.tokenizer()
    windows = token_windows(read_documents(calibration, tokenizer), tokenizer, LENGTH, SEQUENCES)
    compression = Compression(
        codings={place.name: IntegerCoding(bits, GROUP) for place in anatomy.linears()},
        method=Gptq(asymmetric=False),
        ids=windows.ids,
        tied=None,
    )
    with Job(output, {"bits": bits}) as job:
        Pipeline(job, checkpoint, StreamingModel(checkpoint, anatomy), compression, Silent()).run()
        checkpoint.copy_companions(job.partial)
        return job.publish()


def train(base: Path, text: Path, output: Path, steps: int) -> Path:
    """A LoRA that PEFT trains on a packed model."""
    tokenizer = load_tokenizer(base)
    ids = token_windows(read_documents(text, tokenizer), tokenizer, LENGTH, steps * BATCH).ids
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = peft.get_peft_model(load(base, torch.float32), config)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        batch = ids[[(step * BATCH + i) % len(ids) for i in range(BATCH)]]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(output)
    return output


def compare(base: Path, adapter: Path, trained: Path, measured: Path, place: Path) -> dict[str, Any]:
    """Losses, the share that survives each way of merging, and the memory that merging takes."""
    begin_peak()
    try:
        merge_adapter(
            str(base), adapter, place / "merged", str(measured), str(trained),
            keep_share=1.0, residual_rank=RANK, sequences=SEQUENCES, length=LENGTH,
        )  # fmt: skip
        result = place / "merged"
    except GateRefused:
        result = place / "merged.rejected"
    peak = peak_resident_bytes()
    trials = json.loads((result / MANIFEST).read_text())["trials"]
    ours, last = (Survival(**trial["survival"]) for trial in (trials[0], trials[-1]))
    nearest = rounded_to_nearest(base, adapter, measured, place)
    return {
        "loss_base": ours.loss_base,
        "loss_adapter": ours.loss_adapter,
        "gain_error": ours.gain_error,
        "kl_base": ours.kl_base,
        **{
            way: {"gain_kept": found.share, "kl_mean": found.kl_mean, "loss": found.loss_merged}
            for way, found in (("nearest", nearest), ("merged", ours), ("with_residual", last))
        },
        "residual_rank": trials[-1]["rank"],
        "merging_peak_bytes": peak,
    }


def rounded_to_nearest(base: Path, adapter: Path, measured: Path, place: Path) -> Survival:
    """What survives where every target is rounded to nearest on new grids."""
    checkpoint = open_checkpoint(str(base))
    anatomy = read_anatomy(checkpoint)
    opened = LoraAdapter.open(adapter, checkpoint, anatomy)
    tensors = {name: checkpoint.weights.read(name) for name in checkpoint.weights.names}
    for linear in anatomy.linears():
        product = opened.change(linear.name)
        if product is not None:
            stored = stored_weight(checkpoint, linear, tensors)
            packed = Rtn()(stored.dequantize() + product.delta(), None, stored.coding)
            tensors |= {f"{linear.name}.{part}": tensor for part, tensor in packed.tensors.items()}
    directory = place / "nearest"
    directory.mkdir()
    write_tensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_bytes((base / "config.json").read_bytes())
    rounded = open_checkpoint(str(directory))
    tokenizer = checkpoint.tokenizer()
    windows = held_out_windows(
        read_documents(measured, tokenizer), tokenizer, anatomy.context, HELD_OUT_TOKENS
    )
    return measure(
        StreamingModel(checkpoint, anatomy), AdaptedModel(checkpoint, anatomy, opened),
        StreamingModel(rounded, read_anatomy(rounded)), windows.ids, place, Silent(),
    )  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("model", "bits", "base", "adapter", "nearest", "merged", "with residual", "rank")
    table = Table(*columns, "MB, tuning", "MB, merging")
    for row in rows:
        table.add_row(
            row["model"], str(row["bits"]), f"{row['loss_base']:.3f}", f"{row['loss_adapter']:.3f}",
            *(f"{row[way]['gain_kept']:.1%}" for way in ("nearest", "merged", "with_residual")),
            str(row["residual_rank"]),
            *(f"{row[which] / 1e6:.0f}" for which in ("tuning_peak_bytes", "merging_peak_bytes")),
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
