"""Every method of tuning on two real tasks: held-out loss beside memory, time and bytes.

A cell is one method on one task and model, in a process of its own, with the same rows in the same order for
all. Each finished cell is a file of its own below `results/tune_methods`, so that the table grows over time,
with what its numbers depend on: settings, examples, processor, threads, versions, and a fingerprint of these.
What is there isn't run again; where it is of other conditions than those of now, a line says so, and
`--refresh` runs it anew. LoRA stands there with several ranks, to compare at equal numbers of learned
parameters, and `full` with several optimizers, each at a rate that moves the loss in so few steps. `qzo`
learns scales of the model rounded to 4 bits. `--draw` makes the figures of `docs/images` from all cells.

No cell is scored: completing 64 prompts twice takes several times as long as 40 steps, after which none of
these models answers rightly.

    python benchmarks/tune_methods.py [--model demo] [--task bodies sums] [--method lora dora ...] [--refresh]
    python benchmarks/tune_methods.py --draw
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from machine import RESULTS, add_quiet_option, describe, require_quiet, versions, write_result
from tuning_tasks import bodies, sums, write_task

CELLS = "tune_methods"
LENGTH, BATCH, STEPS = 256, 8, 40
MOST_EXAMPLES, MOST_HELD_OUT = 4000, 200
LONGEST_SECONDS = 300
IMAGES = Path(__file__).parents[1] / "docs" / "images"
#: LoRA at other ranks, by the names of their cells.
RANKS = {"lora r1": 1, "lora r2": 2, "lora r32": 32}
#: Rates of `full` with these optimizers, at which 40 steps move the loss; at its own, 1e-5, they hardly do.
RATES: dict[str, float] = {
    "adamw": 3e-4, "adamw8bit": 3e-4, "lion": 3e-5, "adafactor": 3e-4, "soap": 3e-4, "lamb": 3e-3,
    "lars": 1.0,
    "galore": 3e-3, "galore-dct": 1e-3, "apollo": 3e-3, "apollo-mini": 3e-3, "grass": 1e-3, "sgg": 3e-4,
}  # fmt: skip
LOW_RANK = {"rank": 32}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("galore", "galore-dct", "apollo", "grass"), LOW_RANK),
    "sgg": {"inner": "adamw", "interval": 10},
}
#: Of the model that `qzo` learns on.
BITS, GROUP = 4, 64
#: Arguments that say where something lies, not what it is.
PLACES = ("data", "validation", "output")


def methods() -> dict[str, dict[str, Any]]:
    """What is run by the names of cells: arguments of `tailorbird.tune`."""
    from tailorbird import api

    found: dict[str, dict[str, Any]] = {
        row.name: {"method": row.name} for row in api.methods() if row.family in ("adapter", "full")
    }
    found |= {
        name: {"method": "lora", "method_settings": {"rank": rank, "alpha": float(rank)}}
        for name, rank in RANKS.items()
    }
    found["lora+"] = {"method": "lora", "rate_ratio": 16.0}
    for name, rate in RATES.items():
        found[f"full {name}"] = {
            "method": "full", "rate": rate, "optimizer": name,
            "optimizer_settings": OPTIMIZERS.get(name, {}),
        }  # fmt: skip
    for name in ("ist", "density"):
        if name in found:
            found[name]["method_settings"] = {"method": "lora"}
    found["vblora"]["method_settings"] = {"length": 64}
    found.pop("eigenlorax")  # it needs adapters that were learned before
    return found


def conditions(settings: dict[str, Any], model: str, files: tuple[Path, Path]) -> dict[str, Any]:
    """What the numbers of a cell depend on, and a fingerprint of it.

    Parameters
    ----------
    settings : dict
        Arguments of `tailorbird.tune`.
    model : str
        What the model is, whatever it is called on this disk.
    files : (Path, Path)
        The examples.
    """
    machine = describe()
    found: dict[str, Any] = {
        "settings": {key: value for key, value in settings.items() if key not in PLACES} | {"model": model},
        "examples": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        "processor": machine["processor"], "threads": machine["threads"], "versions": versions(),
    }  # fmt: skip
    return found | {"fingerprint": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()}


def to_run(label: str, now: dict[str, Any], refresh: bool) -> bool:
    """Whether a cell is missing, or of other conditions and to be refreshed; tells of one that is kept so."""
    path = RESULTS / f"{label}.json"
    if not path.exists():
        return True
    before = json.loads(path.read_text()).get("conditions")
    if before is None:
        others = "conditions that it doesn't state"
    elif before["fingerprint"] == now["fingerprint"]:
        return False
    else:
        others = "other " + ", ".join(
            key for key in now if key != "fingerprint" and before.get(key) != now[key]
        )
    print(
        f"{label} is of {others}: " + ("run anew" if refresh else "kept; --refresh runs it anew"), flush=True
    )
    return refresh


def packed(model: str, folder: Path) -> Path:
    """The model rounded to nearest, which `qzo` needs; made once."""
    from packed_models import round_plainly
    from tailorbird.model.location import locate

    output = folder / "packed"
    if not output.exists():
        round_plainly(Path(locate(model)), output, BITS, GROUP, int8=False, ends=False)
    return output


def run_child(settings: dict[str, Any]) -> dict[str, Any]:
    """One cell in this process."""
    import tailorbird

    result = tailorbird.tune(**settings)
    return {
        "loss_before": result.loss_before, "loss_after": result.loss_after, "steps": result.steps,
        "best_step": result.best_step, "trainable_parameters": result.trainable_parameters,
        "adapter_bytes": result.adapter_bytes, "tokens_per_s": result.tokens_per_s,
        "peak_rss_bytes": result.peak_rss_bytes, "seconds": result.seconds,
        "truncated": result.data["truncated"], "examples": result.data["examples"],
    }  # fmt: skip


def run_cell(settings: dict[str, Any]) -> dict[str, Any]:
    """One cell in a process of its own; where it fails, why."""
    try:
        ran = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(settings)],
            capture_output=True, text=True, check=False, timeout=LONGEST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {LONGEST_SECONDS} s"}
    if ran.returncode:
        return {"failed": ran.stderr.strip().splitlines()[-1][:300]}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def prepare(task: str, model: str, assets: Path, folder: Path) -> tuple[Path, Path]:
    """Files of a task: examples to learn from, and held-out ones."""
    from tailorbird.model.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    learned, held_out = bodies() if task == "bodies" else sums(assets)
    chance = random.Random(0)
    chance.shuffle(learned)
    chance.shuffle(held_out)
    files = folder / f"{task}.jsonl", folder / f"{task}.held-out.jsonl"
    write_task(learned, tokenizer, LENGTH, MOST_EXAMPLES, files[0])
    write_task(held_out, tokenizer, LENGTH, MOST_HELD_OUT, files[1])
    return files


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run_child(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="demo")
    parser.add_argument("--task", nargs="+", choices=["bodies", "sums"], default=["bodies", "sums"])
    parser.add_argument("--method", nargs="+", help="cells to run; all that aren't there if not given")
    parser.add_argument("--refresh", action="store_true", help="run cells of other conditions anew, too")
    parser.add_argument("--assets", type=Path, default=Path(__file__).parents[2] / "shared" / "assets")
    parser.add_argument("--draw", action="store_true", help="draw the figures from the cells; run none")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    if arguments.draw:
        draw()
        return
    others = require_quiet(arguments.even_if_busy)
    every = methods()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in arguments.task:
            learned, held_out = prepare(task, arguments.model, arguments.assets, folder)
            for cell in arguments.method or every:
                label = f"{CELLS}/{Path(arguments.model).name}/{task}/{cell.replace(' ', '-')}"
                name_of_model = Path(arguments.model).name + (f", {BITS} bits" if cell == "qzo" else "")
                settings = {
                    "model": arguments.model, "data": str(learned), "validation": str(held_out),
                    "output": str(folder / f"{task}-{cell}"), "steps": STEPS, "batch": BATCH,
                    "length": LENGTH, "evaluate_every": STEPS // 2, **every[cell],
                }  # fmt: skip
                now = conditions(settings, name_of_model, (learned, held_out))
                if not arguments.method and not to_run(label, now, arguments.refresh):
                    continue
                if cell == "qzo":
                    settings["model"] = str(packed(arguments.model, folder))
                found = run_cell(settings)
                (RESULTS / label).parent.mkdir(parents=True, exist_ok=True)
                write_result(
                    label, {"others_cores": others, "settings": every[cell], "conditions": now, **found}
                )
                print(label, found.get("loss_after", found.get("failed")), flush=True)
            show(arguments.model, task)


def cells(model: str, task: str) -> dict[str, dict[str, Any]]:
    """The finished cells of a table, least loss first."""
    folder = RESULTS / CELLS / Path(model).name / task
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    done = {name: cell for name, cell in found.items() if cell.get("loss_after") is not None}
    return dict(sorted(done.items(), key=lambda item: item[1]["loss_after"]))


def show(model: str, task: str) -> None:
    """The table of a task."""
    table = Table(
        "method", "held-out loss", "learned", "adapter KB", "MB at peak", "tokens/s", title=f"{model}, {task}"
    )
    for name, cell in cells(model, task).items():
        table.add_row(
            name, f"{cell['loss_before']:.3f} → {cell['loss_after']:.3f}",
            f"{cell['trainable_parameters']:,}", f"{cell['adapter_bytes'] / 1e3:,.0f}",
            f"{cell['peak_rss_bytes'] / 1e6:.0f}", f"{cell['tokens_per_s']:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


def draw() -> None:
    """Loss against memory and against time, for every table."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = CELLS
    from matplotlib import pyplot

    for folder in sorted((RESULTS / CELLS).glob("*/*")):
        found = cells(folder.parent.name, folder.name)
        if not found:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
        kinds = (("peak_rss_bytes", 1e6, "MB at the peak"), ("seconds", 1.0, "seconds"))
        for axis, (key, unit, label) in zip(axes, kinds, strict=True):
            for name, cell in found.items():
                x = cell[key] / unit
                axis.plot(x, cell["loss_after"], "o", color="#2c7563", markersize=4)
                axis.annotate(
                    name, (x, cell["loss_after"]), fontsize=7, xytext=(3, 2), textcoords="offset points"
                )
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("held-out loss, nats per learned token")
        figure.suptitle(f"{folder.parent.name}, {folder.name}: {STEPS} steps of {BATCH} x {LENGTH} tokens")
        figure.tight_layout()
        target = IMAGES / f"tune_methods_{folder.parent.name}_{folder.name}.svg"
        figure.savefig(target, metadata={"Date": None})
        pyplot.close(figure)
        print(target)


if __name__ == "__main__":
    main()
