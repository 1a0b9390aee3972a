"""Quality at equal bytes: uniform settings against planned mixes, on every language model at hand.

For each model: round-to-nearest and second-order rounding at 2, 3, 4 and 8 bits, uniform over all
linears (groups of 32, 64 and 128; embedding and head at 16 bits, and at the same bits), and for the
bytes that each of these takes, the mix that `fit` plans for that many bytes. A mix wins its case when
its KL is below that of the best uniform setting that takes no more bytes. Weights alone are compared: no
linear rounds its inputs.

    python benchmarks/fit_quality.py [--quick] [--only MODEL ...]
    python benchmarks/fit_quality.py --quick --uniform --name methods --bits 3 \\
        --methods rtn awq+rtn gptq:asymmetric=false gptq awq+gptq
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tailorbird
from machine import write_result
from tailorbird.errors import BudgetError, GateRefused

#: Calibration windows of 512 tokens, or of the model's context.
SEQUENCES = 32
ASSETS = Path(__file__).parents[2] / "shared" / "assets"


@dataclass(frozen=True)
class Subject:
    """A model with its texts; None leaves them to the model's own."""

    name: str
    model: str
    calibration: str | None
    held_out: str | None


def subjects(assets: Path) -> list[Subject]:
    """The demo, and the models that lie in `assets`."""
    found = [Subject("demo", "demo", None, None)]
    data = assets / "data"
    texts = {
        "python-7m": ("python-calibration/calibration.txt", "python-heldout/heldout.txt"),
        "gpt2-wikitext2-1m": ("wikitext-2/valid.txt", "wikitext-2/test.txt"),
        "stories260k": ("tinystories/valid.ascii-quotes.txt", None),
    }
    for name, (calibration, held_out) in texts.items():
        directory = assets / "models" / name
        if directory.is_dir():
            found.append(
                Subject(
                    name,
                    str(directory),
                    str(data / calibration),
                    str(data / held_out) if held_out else None,
                )
            )
    return found


def uniform_recipes(methods: list[str], widths: list[int], quick: bool) -> list[tuple[str, str]]:
    """(label, recipe) of every uniform setting; a method is written ``name`` or ``name:setting=value``."""
    recipes = []
    for method in methods:
        name, _, settings = method.partition(":")
        for bits in widths:
            for group in (64,) if quick else (32, 64, 128):
                for ends in (None,) if quick and name == "rtn" else (None, bits):
                    tail = (f",{settings}" if settings else "") + (f",embedding_bits={ends}" if ends else "")
                    label = f"{method} {bits} bits g{group}" + (", embedding too" if ends else "")
                    recipes.append((label, f"{name}:bits={bits},group={group}{tail}"))
    return recipes


def run_fit(subject: Subject, memory: str, out: Path, method: str) -> dict[str, Any]:
    """The numbers of one `fit`."""
    return run(tailorbird.fit, subject, out, memory=memory, method=method)


def run(call: Any, subject: Subject, out: Path, **settings: Any) -> dict[str, Any]:
    """The numbers of one compression, whether or not the gate liked it."""
    try:
        result = call(
            subject.model, output=out, calibration=subject.calibration, evaluation=subject.held_out,
            sequences=SEQUENCES, measure_speed=False, measure_spread=False, activations="exact", **settings,
        )  # fmt: skip
    except GateRefused as refusal:
        result = refusal.result
    shutil.rmtree(result.output)
    return {
        "total_bytes": result.total_bytes,
        "bits_per_weight": result.bits_per_weight,
        "perplexity_before": result.perplexity_before,
        "perplexity": result.perplexity_after,
        "kl_mean": result.kl_mean,
        "top1_agreement": result.top1_agreement,
        "predicted_kl": result.predicted["kl"],
        "seconds": result.seconds,
        "accepted": result.accepted,
    }


def show_runs(console: Console, rows: list[dict[str, Any]]) -> None:
    """Every run in one table."""
    table = Table("model", "setting", "bits per weight", "KL", "predicted", "perplexity", "top-1", "s")
    for row in rows:
        table.add_row(
            row["model"], row["setting"], f"{row['bits_per_weight']:.2f}", f"{row['kl_mean']:.4g}",
            f"{row['predicted_kl']:.4g}", f"{row['perplexity']:.3f}", f"{row['top1_agreement']:.1%}",
            f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)


def cases_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every planned mix beside the best uniform setting of its model that takes no more bytes."""
    cases = []
    for planned in (r for r in rows if r["kind"] == "planned"):
        rivals = [
            r
            for r in rows
            if r["model"] == planned["model"]
            and r["kind"] == "uniform"
            and r["total_bytes"] <= planned["budget_bytes"]
        ]
        best = min(rivals, key=lambda r: r["kl_mean"])
        cases.append(
            {
                "model": planned["model"],
                "budget_bytes": planned["budget_bytes"],
                "planned_kl": planned["kl_mean"],
                "uniform_kl": best["kl_mean"],
                "uniform": best["setting"],
                "wins": planned["kl_mean"] < best["kl_mean"],
            }
        )
    return cases


def keep(name: str, rows: list[dict[str, Any]]) -> float:
    """Write the result file; returns the share of cases that the planned mixes win."""
    cases = cases_of(rows)
    share = sum(case["wins"] for case in cases) / len(cases) if cases else 0.0
    write_result(name, {"runs": rows, "cases": cases, "win_share": share})
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument(
        "--quick", action="store_true", help="one group size; the embedding of rtn left alone"
    )
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--uniform", action="store_true", help="leave out the planned mixes")
    parser.add_argument("--name", default="fit_quality", help="name of the result file")
    arguments = parser.parse_args()
    console = Console()
    rows: list[dict[str, Any]] = []
    known = {subject.name: subject for subject in subjects(arguments.assets)}
    if unknown := set(arguments.only or ()) - known.keys():
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in arguments.only or known:
        subject = known[name]
        with tempfile.TemporaryDirectory(prefix="fit-quality-") as folder:
            out = Path(folder) / "out"
            for method in arguments.methods:  # the scores of a fit serve every setting after it
                if ":" not in method:
                    run_fit(subject, "50%", out, method)
            for label, recipe in uniform_recipes(arguments.methods, arguments.bits, arguments.quick):
                numbers = run(tailorbird.compress, subject, out, recipe=recipe)
                rows.append({"model": subject.name, "setting": label, "kind": "uniform", **numbers})
                console.print(rows[-1])
            keep(arguments.name, rows)  # what is measured is kept, should the rest be cut short
            if arguments.uniform:
                continue
            budgets = sorted({r["total_bytes"] for r in rows if r["model"] == subject.name})
            for budget in budgets:
                try:
                    numbers = run_fit(subject, str(budget), out, "gptq")
                except BudgetError:
                    continue
                rows.append({"model": subject.name, "setting": "planned", "kind": "planned", **numbers})
                rows[-1]["budget_bytes"] = budget
                console.print(rows[-1])
            keep(arguments.name, rows)
    cases = cases_of(rows)
    table = Table("model", "bytes", "best uniform", "its KL", "planned KL", "wins")
    for case in cases:
        table.add_row(
            case["model"], f"{case['budget_bytes']:,}", case["uniform"], f"{case['uniform_kl']:.4g}",
            f"{case['planned_kl']:.4g}", "yes" if case["wins"] else "no",
        )  # fmt: skip
    console.print(table)
    show_runs(console, rows)
    share = keep(arguments.name, rows)
    console.print(f"planned mixes win {share:.0%} of {len(cases)} cases")


if __name__ == "__main__":
    main()
