"""`compare`: one model within several budgets by several methods, each cell as a `fit` of its own would end.

All cells share source, texts and seed, and are measured on the same held-out text. Scores of the source are
measured once for each linear method and kept in their cache (`plan/score_cache.py`); a cell is then a plan, a
compression and the gate. What a cell found is written to a file of its own, under everything that decides it,
so that the same directory takes up more budgets and methods later; the models themselves aren't kept.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailorbird.calibrate.job import Job, missing_parents, remove_empty
from tailorbird.calibrate.ledger import Ledger
from tailorbird.compress import planning
from tailorbird.compress.fit import make
from tailorbird.compress.recipe import Recipe, planned_recipe
from tailorbird.compress.result import FitResult
from tailorbird.compress.stage import continue_stages
from tailorbird.compress.work import (
    Work,
    budget_of,
    check_resources,
    few_tokens,
    foresee,
    machine,
    open_work,
    record_of,
)
from tailorbird.errors import ResourceError, SettingsError, UserError
from tailorbird.model.writing import write_json
from tailorbird.plan.budget import Budget
from tailorbird.plan.candidates import candidate_codings
from tailorbird.plan.score_cache import ScoreCache
from tailorbird.plan.scores import Scores
from tailorbird.progress import Progress

#: Below the directory of a comparison: finished cells, and the jobs of those that aren't.
CELLS, UNFINISHED = "cells", "unfinished"
#: All that the page draws.
DATA = "comparison.json"
#: The gate compares with the prediction alone.
NO_LIMITS: dict[str, float | None] = {"max_kl": None, "max_perplexity_increase": None}


@dataclass(frozen=True)
class Cell:
    """One method within one budget; what wasn't measured is None.

    Attributes
    ----------
    method, budget : str
        As they were written.
    budget_bytes, total_bytes : int
        What was allowed, and the tensor data of the result.
    bits_per_weight : float
    kl_mean : float
        Nats per token on held-out text, source ‖ result.
    perplexity_before, perplexity : float
        Of the source, and of the result.
    top1_agreement : float
        Share of positions at which both think the same token likeliest.
    seconds, peak_rss_bytes
        Of compression and measurement; scores are shared by cells and don't count.
    failure : str or None
        Why there is no result, or why the gate refuses it.
    """

    method: str
    budget: str
    budget_bytes: int
    total_bytes: int | None = None
    bits_per_weight: float | None = None
    kl_mean: float | None = None
    perplexity_before: float | None = None
    perplexity: float | None = None
    top1_agreement: float | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    failure: str | None = None


def compare(
    model: str,
    budgets: Sequence[str],
    methods: Sequence[str],
    output: Path,
    *,
    calibration: str | None,
    evaluation: str | None,
    sequences: int | None,
    length: int | None,
    seed: int,
    command: str,
    progress: Progress,
) -> list[Cell]:
    """Every budget by every method, in the order in which they are given.

    Parameters
    ----------
    output : Path
        Directory of a comparison, or one to be made.
    command : str
        As the page shows it.

    Raises
    ------
    UserError
        A method or a budget that can't be, before any work; or whatever is wrong with model and texts.
    """
    recipes = {name: planned_recipe(name) for name in _each(methods, "--methods", "rtn,gptq")}
    for name, recipe in recipes.items():
        if recipe.rotation is not None:
            raise SettingsError(
                f"`{name}` in a comparison",
                "methods of one source; a rotated one has other scores, and an untied head other bytes",
                f"leave it out, and run fit --method {name} beside the comparison",
            )
    texts = _each(budgets, "--budgets", "2.25bpw,3.25bpw")
    work = open_work(
        model, next(iter(recipes.values())), calibration=calibration, evaluation=evaluation,
        sequences=sequences, length=length, context=None, target=None, seed=seed, progress=progress,
    )  # fmt: skip
    smallest = min((_with(work, recipe) for recipe in recipes.values()), key=lambda one: one.smallest_bytes)
    limits = {text: budget_of(smallest, text, None, None) for text in texts}
    made = _make_directories(output)
    try:
        few = (few_tokens(_with(work, recipe)) for recipe in recipes.values())
        work.remarks += tuple(dict.fromkeys(remark for found in few for remark in found))
        remarks = [*work.texts.notes, *work.remarks]
    except UserError:
        remove_empty(made)
        raise
    for remark in remarks:
        progress.note(remark)
    table = _Table(work, output, len(limits) * len(recipes))
    cells = [table.cell(budget, recipe) for budget in limits.values() for recipe in recipes.values()]
    _remove_if_empty(output / UNFINISHED)
    write_json(output / DATA, _facts(work, command) | {"cells": [asdict(cell) for cell in cells]})
    return cells


def _with(work: Work, recipe: Recipe) -> Work:
    """The same work, with its texts where they are opened, by another recipe."""
    other = copy.copy(work)
    other.recipe, other.stages, other.ledger = recipe, [], None
    other.codings = candidate_codings(None, work.float_dtype, recipe.method.makes)
    return other


def _each(named: Sequence[str], flag: str, example: str) -> list[str]:
    """The names, each once."""
    if not named:
        raise SettingsError(f"{flag} without any", "one or more", f"write for example {flag} {example}")
    return list(dict.fromkeys(named))


def _make_directories(output: Path) -> list[Path]:
    """Make the directory of a comparison, if it isn't one; what wasn't there before, the innermost first."""
    inside = [output / CELLS, output / UNFINISHED]
    try:
        foreign = output.exists() and not (output / CELLS).is_dir()
        if foreign and (not output.is_dir() or any(output.iterdir())):
            raise SettingsError(
                f"output {output}, which holds something else",
                "the directory of a comparison, or a path that doesn't exist",
                "choose another --output",
            )
        made = [path for path in (*inside, output.absolute()) if not path.exists()] + missing_parents(output)
        for path in inside:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"output {output} can't be made ({error.strerror})", "a path that can", "choose another --output"
        ) from error
    return made


def _remove_if_empty(directory: Path) -> None:
    if not any(directory.iterdir()):
        directory.rmdir()


class _Table:
    """Measures the cells of one table, one after the other, or finds them on disk."""

    def __init__(self, work: Work, output: Path, count: int) -> None:
        self.work, self.output, self.count = work, output, count
        self.reached = 0
        self.scores: dict[str, tuple[Scores, ScoreCache]] = {}

    def cell(self, budget: Budget, recipe: Recipe) -> Cell:
        """What the recipe makes within the budget; a failure is an answer, too."""
        self.reached += 1
        label = f"cell {self.reached} of {self.count}, {recipe.name} within {budget.text}"
        work = _with(self.work, recipe)
        work.progress = Labelled(self.work.progress, label)
        record = record_of(work, {"budget": asdict(budget)})
        name = _file_name(record, budget, recipe)
        path = self.output / CELLS / f"{name}.json"
        known = _read_cell(path)
        if known is not None:
            work.progress.note("known already")
            return known
        try:
            cell = self._measure(work, budget, record, name)
        except Exception as error:  # the other cells aren't at fault
            reason = " ".join(str(error).split()) or "no reason given"
            work.progress.note(f"failed: {reason}")
            return Cell(recipe.name, budget.text, budget.total_bytes, failure=reason)
        write_json(path, {"record": record, "cell": asdict(cell)})
        return cell

    def _measure(self, work: Work, budget: Budget, record: dict[str, Any], name: str) -> Cell:
        target = self.output / UNFINISHED / name
        prediction = foresee(work, target)
        check_resources(prediction)
        scores, cache = self._scored(work)
        work.stages = []
        with Job(target, record) as job:
            continue_stages(work, job)
            codings = planning.chosen(work, job, scores, budget)
            work.put_beside(codings)
            result, _ = make(
                work, job, scores, cache, codings, budget, NO_LIMITS, prediction, "", None,
                measure_spread=False,
            )  # fmt: skip
        shutil.rmtree(job.partial)
        return _cell_of(result, work.recipe, budget)

    def _scored(self, work: Work) -> tuple[Scores, ScoreCache]:
        """Scores for linear method and correction of a recipe; what a killed run left of them is taken up."""
        key = planning.score_cache(work).directory.name
        if key not in self.scores:
            part = self.output / UNFINISHED / f"scores-{key}"
            self.scores[key] = planning.score(work, Ledger(part))
            shutil.rmtree(part)
        return self.scores[key]


class Labelled:
    """Passes on what a cell tells, with the name of the cell before it."""

    def __init__(self, progress: Progress, label: str) -> None:
        self.progress, self.label = progress, label

    def stage(self, name: str, total: int) -> None:
        """As in `Progress`."""
        self.progress.stage(f"{self.label}: {name}", total)

    def advance(self, n: int = 1, note: str = "") -> None:
        """As in `Progress`."""
        self.progress.advance(n, note)

    def note(self, text: str) -> None:
        """As in `Progress`."""
        self.progress.note(f"{self.label}: {text}")

    def done(self) -> None:
        """The table isn't done when a cell is."""


def _cell_of(result: FitResult, recipe: Recipe, budget: Budget) -> Cell:
    failed = next((check for check in result.checks if not check["passed"]), None)
    return Cell(
        method=recipe.name,
        budget=budget.text,
        budget_bytes=budget.total_bytes,
        total_bytes=result.total_bytes,
        bits_per_weight=result.bits_per_weight,
        kl_mean=result.kl_mean,
        perplexity_before=result.perplexity_before,
        perplexity=result.perplexity_after,
        top1_agreement=result.top1_agreement,
        seconds=result.seconds,
        peak_rss_bytes=result.peak_rss_bytes,
        failure=None if failed is None else f"refused by the gate: {failed['name']}: {failed['detail']}",
    )


def _file_name(record: dict[str, Any], budget: Budget, recipe: Recipe) -> str:
    """Readable, and different for everything that decides the cell."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    return f"{recipe.name}-{re.sub('[^A-Za-z0-9.]+', '', budget.text)}-{digest}"


def _read_cell(path: Path) -> Cell | None:
    """A cell that was finished, or None where there is none that can be read."""
    try:
        return Cell(**json.loads(path.read_text())["cell"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _facts(work: Work, command: str) -> dict[str, Any]:
    """What all cells share, in JSON types."""
    texts = {"calibration": work.texts.calibration, "evaluation": work.texts.held_out}
    record = record_of(work, {})
    return {
        "model": work.name,
        "parameters": work.checkpoint.parameters,
        "fingerprint": work.checkpoint.fingerprint,
        "seed": work.seed,
        "versions": record["versions"],
        "machine": machine(),
        "command": command,
        "warnings": [*work.texts.notes, *work.remarks],
        **{
            name: {"source": text.source, "tokens": text.tokens, "fingerprint": text.fingerprint}
            for name, text in texts.items()
        },
    }
