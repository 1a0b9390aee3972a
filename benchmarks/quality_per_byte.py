"""What a result loses for its bytes: our recipes and peers at 2, 3 and 4 bits, on one text by one evaluator.

Groups of 64, or tables of rows for `ganq`, `bcq` and `leanquant-tables`, or groups of 128 for `billm`, whose
two magnitudes take as much as scale and zero point of 64; `eora` and `lq-lora` take rank 8 beside that;
embedding and head stay. Every cell is one subject at one width
on one model, in a process of its own: recipes of the project through `compress`, peers in their own
environments with the same calibration windows. What a peer's linears stand for is put into a dense
checkpoint, and all are walked over the held-out text beside the source. A cell is a file of its own below
`results/quality_per_byte`, with the divergence of every held-out window, so that subjects are compared
window by window; what is there isn't run again.

`fit-fast@PEER`, `fit-balanced@PEER` and `fit-best@PEER` are what `fit` plans for the bytes that the peer's
cell took, embedding and head left as that peer leaves them. Where those are float32, `fit` stores them in 16
bits; its linears get none of what that saves. Tables set each beside its peer, window by window; others
stand beside `--against`. `autoround-best` has the settings that AutoRound's README gives for most accuracy,
but for the amount of text.

A peer has cells only at the widths that it has. The environments lie in one folder, each with the name of its
program; peers that aren't there are left out. `python -m venv FOLDER/NAME`, then
`FOLDER/NAME/bin/pip install torch` and

    autoround      auto-round
    llmcompressor  llmcompressor
    gptqmodel      gptqmodel
    hqq            hqq
    bitsandbytes   bitsandbytes transformers accelerate
    torchao        torchao transformers accelerate
    quanto         optimum-quanto transformers accelerate
    llamacpp       transformers gguf

llama.cpp's tools are built from the source that llama-cpp-python carries, and lie beside `python`:

    FOLDER/llamacpp/bin/pip download --no-binary llama-cpp-python --no-deps llama-cpp-python
    tar xf llama_cpp_python-*.tar.gz && cmake -S llama_cpp_python-*/vendor/llama.cpp -B build \\
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF
    cmake --build build --target llama-imatrix llama-quantize
    cp build/bin/llama-imatrix build/bin/llama-quantize FOLDER/llamacpp/bin

    python benchmarks/quality_per_byte.py [--peers FOLDER] [--only MODEL ...] [--bits 2 3 4] [--subject ...]
    python benchmarks/quality_per_byte.py --draw [--against gptq]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import k_quants
from cpu_peers import installed_version
from fit_quality import ASSETS, Subject, subjects
from machine import RESULTS, add_quiet_option, require_quiet, write_result
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.effort import EFFORTS
from tailorbird.compress.recipe import make_recipe
from tailorbird.compress.work import Work, open_work
from tailorbird.evaluate.quality import Divergence, Quality
from tailorbird.evaluate.streamed import walk_together
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_tensors
from tailorbird.report.comparison import kl_by_bytes, standalone

CELLS = "quality_per_byte"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
CHILD = Path(__file__).parent / "quality_child.py"
#: Settings of a child that are paths, beside its output.
PATHS = ("model", "calibration", "evaluation", "ids")
GROUP = 64
SEQUENCES = 128
OWN = (
    "rtn", "gptq", "rsq", "awq+gptq", "cfp+gptq", "outliertune+gptq", "hadamard+gptq", "quantease",
    "leanquant", "leanquant-tables", "decoupleq", "yaqa", "spqr", "llm-int8", "ganq", "bcq",
    "higgs", "higgs-pairs", "double-rounding", "billm", "billm-static",
    "gptq+eora", "gptq+lq-lora",
    "gptq+signround", "decoupleq+signround", "gptq+flexround", "gptq+efficientqat",
    "gptq+efficientqat+step-sizes", "rtn+omniquant", "rtn+omniquant-transform", "rtn+cbq", "gptq+cbq",
    "cfp+rtn+cbq", "gptq+distil", "gptq+step-sizes", "gptq+pv-tuning", "gptq+signround+distil",
    "spqr+signround+distil",
)  # fmt: skip
#: Subjects that have some widths only.
WIDTHS = {
    "billm": (2,), "billm-static": (2,), "double-rounding": (8,), "ganq": (2, 3, 4), "bcq": (2, 3, 4),
    "leanquant-tables": (2, 3, 4), "higgs": (2, 3, 4), "higgs-pairs": (2, 3, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A program beside which ours is set.

    Attributes
    ----------
    environment, package : str
        Folder of its environment, and the package whose version is noted.
    bits : tuple of int
        Widths that it has.
    group : int or None
        Weights that share a scale; None where its formats say themselves.
    """

    environment: str
    package: str
    bits: tuple[int, ...]
    group: int | None = GROUP


PEERS = {
    "autoround": Peer("autoround", "auto-round", (2, 3, 4, 8)),
    "autoround-best": Peer("autoround", "auto-round", (2, 3, 4, 8)),
    "llmcompressor-gptq": Peer("llmcompressor", "llmcompressor", (2, 3, 4, 8)),
    "llmcompressor-awq": Peer("llmcompressor", "llmcompressor", (2, 3, 4, 8)),
    "gptqmodel": Peer("gptqmodel", "gptqmodel", (2, 3, 4, 8)),
    "hqq": Peer("hqq", "hqq", (2, 3, 4, 8)),
    "bitsandbytes": Peer("bitsandbytes", "bitsandbytes", (4,)),
    "bitsandbytes-double": Peer("bitsandbytes", "bitsandbytes", (4,)),
    "bitsandbytes-int8": Peer("bitsandbytes", "bitsandbytes", (8,), None),
    "torchao": Peer("torchao", "torchao", (2, 3, 4)),
    "torchao-int8": Peer("torchao", "torchao", (8,), None),
    "quanto": Peer("quanto", "optimum-quanto", (2, 4, 8), None),
    **{name: Peer("llamacpp", "gguf", tuple(formats), None) for name, formats in k_quants.FORMATS.items()},
}


#: Our planner at each effort, within the bytes of a peer's cell.
FITS = {f"fit-{effort}@{peer}": (effort, peer) for peer in PEERS for effort in EFFORTS}


@dataclass(frozen=True)
class Opened:
    """A model with its texts, as every subject gets them."""

    subject: Subject
    work: Work
    ids: Path

    @property
    def linears(self) -> list[str]:
        """Names of the linears inside the blocks."""
        return [place.name for place in self.work.anatomy.linears()]

    @property
    def transposed(self) -> list[str]:
        """Those of them that are stored as ``[in, out]``."""
        return [place.name for place in self.work.anatomy.linears() if place.transposed]


def open_subject(subject: Subject, folder: Path, sequences: int = SEQUENCES) -> Opened:
    """Open a model, and leave so many calibration windows in `folder`."""
    work = open_work(
        subject.model, make_recipe("rtn"), calibration=subject.calibration, evaluation=subject.held_out,
        sequences=sequences, length=None, context=None, target=None, seed=0, progress=None,
    )  # fmt: skip
    ids = folder / "ids.safetensors"
    write_tensors(ids, {"ids": work.texts.calibration.ids})
    return Opened(subject, work, ids)


def with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that mean the same in any folder; a model that isn't here is a name."""
    here = {name for name in PATHS if settings.get(name) and Path(settings[name]).exists()}
    return {
        name: os.path.abspath(value) if name in here | {"output"} else value
        for name, value in settings.items()
    }


def run_child(python: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the process says of itself; where it fails, why.

    It runs in an empty folder, which is removed with what programs leave where they run, such as logs.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if "PYTHONPATH" in environment:
        folders = environment["PYTHONPATH"].split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, folders))
    # not resolved: an environment's python is a link, and says where its packages are
    command = [os.path.abspath(python), str(CHILD.resolve()), json.dumps(with_absolute_paths(settings))]
    with tempfile.TemporaryDirectory(prefix="child-") as folder:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=folder
        )  # fmt: skip
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"status {ran.returncode}"]
        return {"failed": lines[-1][:300]}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def dense_checkpoint(opened: Opened, linears: Path, output: Path) -> Path:
    """The source with other values in its linears, and in what else is in `linears`, in float32."""
    checkpoint = opened.work.checkpoint
    learned = Weights.open_file(linears)
    output.mkdir()
    checkpoint.copy_companions(output)
    (output / "config.json").write_bytes((checkpoint.directory / "config.json").read_bytes())
    tensors = {name: checkpoint.weights.read(name) for name in checkpoint.weights.names}
    for name in (*opened.linears, *learned.names):
        tensors[f"{name}.weight"] = learned.read(name)
    write_tensors(output / "model.safetensors", tensors)
    return output


def per_window(opened: Opened, result: Path, scratch: Path) -> list[Quality]:
    """Quality on each held-out window by itself."""
    checkpoint = open_checkpoint(str(result))
    models = [
        StreamingModel(opened.work.checkpoint, opened.work.anatomy),
        StreamingModel(checkpoint, read_anatomy(checkpoint)),
    ]
    windows: list[Quality] = []
    metrics = [Divergence()]

    def on_logits(logits: list[torch.Tensor], labels: torch.Tensor) -> None:
        metrics[-1].add(*logits, labels)
        if len(labels) < len(logits[0]):  # nothing follows the last position of a window
            windows.append(metrics[-1].finish())
            metrics.append(Divergence())

    walk_together(models, opened.work.texts.held_out.ids, scratch, on_logits)
    return windows


def measured(windows: list[Quality]) -> dict[str, Any]:
    """All windows together; they are of one length."""

    def perplexity(values: list[float]) -> float:
        return math.exp(sum(map(math.log, values)) / len(values))

    return {
        "kl_mean": sum(w.kl_mean for w in windows) / len(windows),
        "perplexity_before": perplexity([w.perplexity_before for w in windows]),
        "perplexity": perplexity([w.perplexity_after for w in windows]),
        "top1_agreement": sum(w.top1_agreement for w in windows) / len(windows),
        "tokens": sum(w.tokens for w in windows),
        "kl_windows": [w.kl_mean for w in windows],
    }


def stored_bytes(opened: Opened, bits: float) -> float:
    """Bytes of all tensors, with so many bits for each weight inside the blocks and the rest as it is."""
    weights = opened.work.checkpoint.weights
    inside = [weights.info(f"{name}.weight") for name in opened.linears]
    count = sum(math.prod(info.shape) for info in inside)
    return weights.total_bytes - sum(info.nbytes for info in inside) + bits * count / 8


def narrowed_bytes(opened: Opened) -> int:
    """Bytes that a plan saves by storing embedding and head of a float32 model in 16 bits."""
    weights, anatomy = opened.work.checkpoint.weights, opened.work.anatomy
    ends = {f"{name}.weight" for name in (anatomy.embedding, anatomy.head)}
    infos = [weights.info(name) for name in ends if name in weights]
    return sum(info.nbytes // 2 for info in infos if info.dtype == torch.float32)


def budget_for(name: str, opened: Opened, bits: int) -> dict[str, Any] | None:
    """What a subject is told beside the rest: of `FITS`, its effort and the bytes of the peer's cell.

    The linears get what the peer's have, and nothing of what narrower ends save. None where the peer has no
    such cell.
    """
    if name not in FITS:
        return {}
    effort, peer = FITS[name]
    file = RESULTS / CELLS / opened.subject.name / f"{bits}-bits" / f"{peer}.json"
    cell = json.loads(file.read_text()) if file.exists() else {}
    if "total_bytes" not in cell:
        return None
    return {"effort": effort, "memory": str(cell["total_bytes"] - narrowed_bytes(opened))}


def run_cell(
    opened: Opened, name: str, bits: int, python: str, steps: int | None, budget: dict[str, Any]
) -> dict[str, Any]:
    """One subject at one width; `budget` is what `budget_for` says."""
    with tempfile.TemporaryDirectory(prefix="quality-") as temporary:
        folder = Path(temporary)
        settings = {
            "subject": name, "bits": bits, "group": GROUP, "model": opened.subject.model,
            "calibration": opened.subject.calibration, "evaluation": opened.subject.held_out,
            "sequences": SEQUENCES, "ids": str(opened.ids), "linears": opened.linears,
            "transposed": opened.transposed, "output": str(folder / "result"), "steps": steps, **budget,
        }  # fmt: skip
        if name in PEERS:
            settings["model"] = str(opened.work.checkpoint.directory)
        found = run_child(python, settings)
        if "failed" in found:
            return found
        result = Path(found.pop("output"))
        if name in PEERS:
            total = round(stored_bytes(opened, found["bits_per_weight"]))
            result = dense_checkpoint(opened, result / "linears.safetensors", folder / "dense")
        else:
            total = Weights.open(result).total_bytes  # a rotation may have untied the head
        scratch = folder / "scratch"
        scratch.mkdir()
        quality = measured(per_window(opened, result, scratch))
    return {**found, "total_bytes": total, **quality}


def run_cells(arguments: argparse.Namespace, busy: float) -> None:
    """Those that aren't there, or all that are asked for again."""
    pythons = dict.fromkeys((*OWN, *FITS), sys.executable)
    if arguments.peers is not None:
        for name, peer in PEERS.items():
            python = arguments.peers / peer.environment / "bin" / "python"
            if python.exists():
                pythons = {name: str(python)} | pythons  # before those that match its bytes
    missing = [name for name in arguments.subject or () if name not in pythons]
    if missing:
        raise SystemExit(f"no environment for {', '.join(missing)} · expected: one in the folder of --peers")
    for subject in subjects(ASSETS):
        if arguments.only and subject.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory(prefix="quality-") as folder:
            opened = open_subject(subject, Path(folder))
            for bits in arguments.bits:
                for name in arguments.subject or list(pythons):
                    if bits not in WIDTHS.get(name, (bits,)):
                        continue
                    label = f"{CELLS}/{subject.name}/{bits}-bits/{name}"
                    if (RESULTS / f"{label}.json").exists() and not arguments.again:
                        continue
                    if name in PEERS and bits not in PEERS[name].bits:
                        continue
                    budget = budget_for(name, opened, bits)
                    if budget is None:
                        continue
                    found = run_cell(opened, name, bits, pythons[name], arguments.steps, budget)
                    if name in PEERS:
                        version = installed_version(pythons[name], PEERS[name].package)
                        found = {"peer": version, "group_size": PEERS[name].group, **found}
                    texts = opened.work.texts
                    (RESULTS / label).parent.mkdir(parents=True, exist_ok=True)
                    write_result(
                        label,
                        {
                            "model": subject.name, "subject": name, "bits": bits, "group_size": GROUP,
                            "steps_of_peers": arguments.steps, "others_cores": busy,
                            "calibration": texts.calibration.fingerprint,
                            "held_out": texts.held_out.fingerprint, **found,
                        },
                    )  # fmt: skip
                    print(label, found.get("kl_mean", found.get("failed")), flush=True)


def paired_difference(windows: list[float], others: list[float]) -> tuple[float, float]:
    """Mean of the differences window by window, and its standard error.

    Texts differ more from each other than methods do on one text: what is common to both falls out.
    """
    differences = torch.tensor(windows, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    error = differences.std().item() / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return differences.mean().item(), error


def beside(name: str, own: dict[str, dict[str, Any]], against: str) -> tuple[str, str, str]:
    """Whom a subject is compared with, its divergence less theirs, and how many standard errors that is.

    What `fit` makes within the bytes of a peer is compared with that peer, all others with `against`. Empty
    texts where there is no such cell on the same text.
    """
    rival = FITS[name][1] if name in FITS else against
    cell, other = own[name], own.get(rival)
    if other is None or rival == name or other["held_out"] != cell["held_out"]:
        return "", "", ""
    mean, error = paired_difference(cell["kl_windows"], other["kl_windows"])
    return rival, f"{mean:+.4f} ± {error:.4f}", f"{mean / error:+.1f}" if error > 0 else ""


def show(model: str, cells: list[dict[str, Any]], against: str) -> None:
    """The table of one model, width by width, least divergence first."""
    columns = (
        "bits", "subject", "bits per weight", "bytes", "KL", "beside", "less its KL", "errors", "perplexity",
        "top-1", "s", "peak MiB",
    )  # fmt: skip
    table = Table(*columns, title=model)
    for bits in sorted({cell["bits"] for cell in cells}):
        own = {cell["subject"]: cell for cell in cells if cell["bits"] == bits}
        for name, cell in sorted(own.items(), key=lambda item: item[1]["kl_mean"]):
            table.add_row(
                str(bits), name, f"{cell['bits_per_weight']:.2f}", f"{cell['total_bytes']:,}",
                f"{cell['kl_mean']:.4f}", *beside(name, own, against),
                f"{100 * (cell['perplexity'] / cell['perplexity_before'] - 1):+.1f} %",
                f"{cell['top1_agreement']:.1%}", f"{cell['seconds']:.0f}",
                f"{cell['peak_rss_bytes'] / 2**20:.0f}",
            )  # fmt: skip
    Console(width=180).print(table)


def draw(against: str) -> None:
    """Tables and figures of all cells that are there."""
    for folder in sorted(path for path in (RESULTS / CELLS).glob("*") if path.is_dir()):
        cells = [json.loads(file.read_text()) for file in sorted(folder.glob("*/*.json"))]
        for cell in (cell for cell in cells if "failed" in cell):
            print(f"{folder.name}, {cell['bits']} bits, {cell['subject']}: {cell['failed']}")
        cells = [cell for cell in cells if "failed" not in cell]
        if cells:
            show(folder.name, cells, against)
            named = [cell | {"method": cell["subject"]} for cell in cells]
            (IMAGES / f"{CELLS}_{folder.name}.svg").write_text(standalone(kl_by_bytes(named)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--only", nargs="+", metavar="MODEL")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument(
        "--subject",
        nargs="+",
        choices=[*OWN, *PEERS, *FITS],
        metavar="NAME",
        help="run only these",
    )
    parser.add_argument("--again", action="store_true", help="run cells anew that are there")
    parser.add_argument(
        "--steps", type=int, help="updates of AutoRound, for a try; its own number if left out"
    )
    parser.add_argument(
        "--draw", action="store_true", help="draw tables and figures from the cells; run none"
    )
    parser.add_argument("--against", default="gptq", help="subject that all but fit@PEER are compared with")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    if not arguments.draw:
        run_cells(arguments, require_quiet(arguments.even_if_busy))
    draw(arguments.against)


if __name__ == "__main__":
    main()
