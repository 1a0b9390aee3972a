"""What guesses beside the text itself, from what an option names: a model, the model's own self, or heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorbird.drafting.heads import is_heads, read_heads
from tailorbird.errors import SettingsError
from tailorbird.model.load import load, load_tokenizer
from tailorbird.run.fused import FusedModel
from tailorbird.run.generate import context_length
from tailorbird.run.pages import page_bytes
from tailorbird.run.parts import Unsuited
from tailorbird.serve.guess.guessing import Guesser
from tailorbird.serve.guess.heads import DraftHeads
from tailorbird.serve.guess.model import DraftModel
from tailorbird.serve.guess.skip import SkippingSelf, evenly
from tailorbird.serve.memory import weight_bytes
from tailorbird.serve.runner import FusedRunner, Runner
from tailorbird.serve.sequence import Sequence

#: What stands for the model itself with blocks left out.
SELF = "self:skip"
#: Shares of its blocks that run then, and what these guessers are called: the one that pays is used.
KEPT = {"skip 1/2": 1 / 2, "skip 2/3": 1 / 3}


@dataclass(frozen=True)
class Opened:
    """What an option named, loaded.

    Attributes
    ----------
    weight_bytes : int
        Beside those of the model that is served.
    page_bytes : int
        For each page of the model that is served.
    make : callable
        The guessers, given the number of pages and what gets a sequence pages for so many tokens.
    """

    weight_bytes: int
    page_bytes: int
    make: Callable[[int, Callable[[Sequence, int], bool]], list[Guesser]]


def open_guessers(named: str | None, tokenizer: Any, runner: Runner) -> Opened:
    """Load what guesses beside the text itself.

    Parameters
    ----------
    named : str or None
        A directory or id of a model, ``self:skip``, or a directory of heads that `tailorbird draft` wrote.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the model that is served by `runner`.

    Raises
    ------
    SettingsError
        The draft model has another vocabulary or can't run in compiled blocks, the heads are another model's,
        or the model that is served runs through its modules.
    """
    if named is None:
        return Opened(0, 0, lambda pages, room: [])
    if not isinstance(runner, FusedRunner):
        raise SettingsError(
            f"--draft {named} for a model that runs through its modules ({runner.note})",
            "a model that runs in compiled blocks, which can check guesses",
            "serve it without --draft",
        )
    if named == SELF:
        blocks = len(runner.model.blocks)
        spans = {name: evenly(blocks, round(blocks * share)) for name, share in KEPT.items()}
        return Opened(
            0, 0, lambda pages, room: [SkippingSelf(name, runner, kept, room) for name, kept in spans.items()]
        )
    if is_heads(named):
        heads = read_heads(Path(named), runner.model)
        return Opened(heads.nbytes, 0, lambda pages, room: [DraftHeads("heads", runner.model, heads)])
    return _model(named, tokenizer)


def _model(named: str, tokenizer: Any) -> Opened:
    _check_same_vocabulary(named, tokenizer)
    model = load(named)
    try:
        fused = FusedModel(model)
    except Unsuited as reason:
        raise SettingsError(
            f"a draft model that can't run in compiled blocks ({reason})",
            "one that can",
            "choose another one",
        ) from reason
    context = context_length(model) or 1 << 30
    return Opened(
        weight_bytes(model),
        page_bytes(fused.page_shapes, fused.cache_dtype),
        lambda pages, room: [DraftModel("model", fused, pages, context)],
    )


def _check_same_vocabulary(named: str, tokenizer: Any) -> None:
    mine, its = tokenizer.get_vocab(), load_tokenizer(named).get_vocab()
    if mine == its:
        return
    different = min(
        (token for token in mine.keys() | its.keys() if mine.get(token) != its.get(token)),
        key=lambda token: (mine.get(token, its.get(token)), token),
    )
    raise SettingsError(
        f"draft model {named}, whose tokenizer has {len(its)} tokens and another number for {different!r}",
        f"the vocabulary of the model that is served, {len(mine)} tokens",
        "choose a draft model of the same family, or --draft self:skip",
    )
