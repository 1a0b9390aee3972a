"""How many held-out prompts a model completes as expected, by its own likeliest tokens.

Two ways to compare: ``exact``, the text without white space around it; ``number``, the last number of either
text, as exercises in arithmetic end ("#### 42", https://arxiv.org/abs/2110.14168).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from tailorbird.adapt.data.examples import Examples
from tailorbird.adapt.rows import Example
from tailorbird.errors import SettingsError
from tailorbird.run.generate import ModuleDecoding, choose, stop_tokens

#: Tokens that are generated beyond the expected ones: what would be right, but goes on, is seen to be wrong.
BEYOND = 8
#: Examples that are scored: at most, and at least where there are so many.
MOST, LEAST = 64, 8

_NUMBER = re.compile(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, commas between its thousands or not; None where there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


#: What of a completion is compared, by the name of the score.
SCORES: dict[str, Callable[[str], Any]] = {"exact": str.strip, "number": last_number}


def check_score(name: str) -> None:
    """SettingsError where there is no such score."""
    if name not in SCORES:
        raise SettingsError(f"score `{name}`", " or ".join(SCORES), "give for example --score exact")


def up_to_its_end(said: str, expected: str) -> str:
    """What was said, up to where it ends as the expected text does: by white space that no token follows.

    That is how turns end which a chat template writes as lines: the model goes on with the next one.
    """
    ending = expected[len(expected.rstrip()) :]
    return ending.join(said.split(ending)[: expected.count(ending)]) if ending else said


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt, and what shall follow.

    Attributes
    ----------
    prompt : Tensor[n]
        int64.
    tokens : Tensor[m]
        int64: the expected completion, with the token that ends it.
    """

    prompt: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, example: Example) -> Question | None:
        """The last stretch of an example that is learned, after all before it; None where nothing is."""
        learned = example.learned.nonzero()[:, 0]
        if not len(learned):
            return None
        end = int(learned[-1]) + 1
        others = (~example.learned[:end]).nonzero()[:, 0]
        start = int(others[-1]) + 1 if len(others) else 0
        return cls(example.ids[:start], example.ids[start:end]) if start else None


class Scorer:
    """Scores a model, whatever is attached to it at the moment, always on the same questions.

    Parameters
    ----------
    name : str
        Of `SCORES`.
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    questions : sequence of Question
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, questions: Sequence[Question]) -> None:
        self.name, self.model, self.tokenizer, self.questions = name, model, tokenizer, questions
        self._ends = stop_tokens(model, tokenizer)
        # templates may end turns by tokens that were added, but aren't called special
        self._marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def right(self) -> int:
        """How many completions agree with the expected ones."""
        compared = SCORES[self.name]
        return sum(
            compared(expected) == compared(said) for expected, said in map(self._texts, self.questions)
        )

    def _texts(self, question: Question) -> tuple[str, str]:
        """The expected completion, and the model's."""
        tokens, said = question.tokens.tolist(), self._text(self._complete(question))
        if self._ending(question):
            return self._text(tokens[:-1]), said
        expected = self._text(tokens)
        return expected, up_to_its_end(said, expected)

    def _ending(self, question: Question) -> set[int]:
        """The expected completion's last token, where it is one that ends texts, such as a turn's."""
        return {int(question.tokens[-1])} & (self._ends | self._marks)

    @torch.no_grad()
    def _complete(self, question: Question) -> list[int]:
        """The likeliest tokens after a prompt, until one that ends a text or the expected one."""
        ends = self._ends | self._ending(question)
        # the modules themselves: compiled blocks would leave out what is attached to linears
        decoding, fed, found = ModuleDecoding(self.model), question.prompt[None], list[int]()
        for _ in range(len(question.tokens) + BEYOND):
            token = choose(decoding.read(fed), 0.0, torch.empty(0))
            if int(token) in ends:
                break
            found.append(int(token))
            fed = token[None]
        return found

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def questions_of(name: str, examples: Examples, tokenizer: Any, longest: int, room: int) -> list[Question]:
    """The first examples that can be scored.

    Parameters
    ----------
    name : str
        Of `SCORES`; with ``number`` an expected completion has one.
    examples : Examples
        Held out.
    tokenizer : transformers.PreTrainedTokenizerBase
    longest : int
        Examples of so many tokens may have lost their end, and are left out.
    room : int
        Tokens that may be generated in all; `LEAST` questions are asked whatever they take.

    Raises
    ------
    SettingsError
        The examples are texts without prompts, or none of them can be scored.
    """
    found: list[Question] = []
    for index in range(len(examples)) if examples.facts.shape != "text" else ():
        example = examples[index]
        question = Question.of(example) if len(example) < longest else None
        if question is None:
            continue
        text = tokenizer.decode(question.tokens.tolist(), skip_special_tokens=True)
        if SCORES[name](text) in (None, ""):
            continue
        room -= len(question.tokens) + BEYOND
        if len(found) == MOST or (room < 0 and len(found) >= LEAST):
            break
        found.append(question)
    if not found:
        raise SettingsError(
            f"a score `{name}` on held-out examples of the shape {examples.facts.shape}",
            "prompts with completions, instructions or conversations that end in what is compared",
            "leave out --score, or give other examples",
        )
    return found
