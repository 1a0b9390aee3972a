"""How much work `fit` puts into rounding, in three steps, and what each method gained.

`fast` rounds block by block; `balanced` learns the rounding of each block, once it is rounded; `best` learns
all weights together after that, for which source and result must be in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailorbird.compress.recipe import JOINT, STAGES, Recipe, make_recipe, planned_recipe
from tailorbird.compress.work import Work, foresee
from tailorbird.errors import SettingsError, nearest
from tailorbird.plan.budget import format_size

EFFORTS = {"fast": "gptq", "balanced": "gptq+signround", "best": "gptq+signround+distil"}
DEFAULT_EFFORT = "fast"


def recipe_of(effort: str | None, method: str | None) -> Recipe:
    """The recipe of an effort, or the method that is stated instead of one.

    Raises
    ------
    SettingsError
        Both are stated, or one that there isn't.
    """
    if method is not None:
        if effort is not None:
            raise SettingsError(
                f"--effort {effort} and --method {method}", "one of them", "leave out the other"
            )
        return planned_recipe(method)
    chosen = effort or DEFAULT_EFFORT
    if chosen not in EFFORTS:
        raise SettingsError(f"effort `{chosen}`", ", ".join(EFFORTS), nearest(chosen, EFFORTS))
    return make_recipe(EFFORTS[chosen])


def lower_where_memory_is_short(work: Work, effort: str | None, output: Path) -> None:
    """Give `work` the recipe of `balanced` where that of `best` needs more memory than there is."""
    if effort != "best":
        return
    prediction = foresee(work, output)
    if prediction.peak_rss_bytes <= prediction.available_bytes:
        return
    work.recipe = make_recipe(EFFORTS["balanced"])
    remark = (
        f"effort best needs {format_size(prediction.peak_rss_bytes)} of memory to learn the whole model, and "
        f"{format_size(prediction.available_bytes)} are free: balanced was chosen"
    )
    work.remarks = (*work.remarks, remark)
    work.progress.note(remark)


def methods_run(recipe: Recipe, measured: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """What each method of a recipe gained, in the order in which they ran.

    Parameters
    ----------
    measured : dict
        As `pipeline.Pipeline.run` returns it.

    Returns
    -------
    list of dict
        ``name``, and of a block method ``block_error_before`` and ``block_error_after``: squared difference
        to the outputs of the source's block over their squared length, mean over the blocks that were
        learned, each as it was kept, with ``tried`` and ``kept``, the number of these blocks and of those
        that took what was learned. Of a model method ``kl_before`` and ``kl_after``, nats per token on
        calibration windows that it didn't learn from; ``tried`` is 1, and ``kept`` 0 where all stayed as it
        was.
    """
    blocks = [found for found in measured.values() if "block_error_before" in found]
    whole = measured.get("whole", {})
    entries = []
    for name in recipe.name.split(JOINT):
        entry: dict[str, Any] = {"name": name}
        if name in STAGES["block"] and blocks:
            kept = [min(found["block_error_before"], found["block_error_after"]) for found in blocks]
            entry["block_error_before"] = sum(found["block_error_before"] for found in blocks) / len(blocks)
            entry["block_error_after"] = sum(kept) / len(kept)
            better = [found["block_error_after"] < found["block_error_before"] for found in blocks]
            entry |= {"tried": len(blocks), "kept": sum(better)}
        if name in STAGES["whole"] and whole:
            entry |= {key: whole[key] for key in ("kl_before", "kl_after")}
            entry |= {"tried": 1, "kept": int(whole["kl_after"] < whole["kl_before"])}
        entries.append(entry)
    return entries
