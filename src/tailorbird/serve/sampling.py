"""Choosing tokens for a batch of sequences that each have settings, a past and a source of chance.

`tailorbird.kernels.sampling` says in which order settings act on a row. A sequence's draws come from its seed
and the number of its token only, so that it continues the same way whatever else is served.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError, SettingsError, TailorbirdError
from tailorbird.kernels import sampling as kernel
from tailorbird.serve.grammar import Matcher
from tailorbird.serve.request import Sampling, TokenLogprob

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for a token of a sequence: 53 bits, each pair of arguments another.

    The state that SplitMix64 (https://doi.org/10.1145/2714064.2660195) started at the mixed seed has after so
    many steps, mixed; there is nothing to keep from token to token.
    """
    return (_mixed(_mixed(seed) + (position + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mixed(value: int) -> int:
    """The finalizer of SplitMix64: 64 bits of which each depends on each of `value`."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


@dataclass(frozen=True)
class Choice:
    """The next token of a sequence.

    Attributes
    ----------
    token : int
        -1 where there is an error.
    logprob : TokenLogprob or None
        Of the model's own distribution, where the sequence asked for it.
    error : TailorbirdError or None
        Why no token could be chosen; it concerns this sequence alone.
    """

    token: int
    logprob: TokenLogprob | None = None
    error: TailorbirdError | None = None


class Sampler:
    """What the choice of a sequence's next token depends on beside its logits.

    Parameters
    ----------
    sampling : Sampling
    prompt : sequence of int
        Counted for the repetition penalty; tokens beyond the vocabulary have no logit to penalize.
    stop : collection of int
        Tokens that end the text.
    vocab_size : int
        Logits of a row.
    seed : int
        Of the draws; `sampling.seed` is what the client wishes, and the engine's to heed.
    matcher : Matcher, optional
        Of `sampling.grammar`, belonging to this sequence alone.

    Raises
    ------
    SettingsError
        A bias for a token beyond the vocabulary.
    ValueError
        A grammar without a matcher, or a matcher without a grammar.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        stop: Collection[int],
        vocab_size: int,
        seed: int,
        matcher: Matcher | None = None,
    ) -> None:
        if (sampling.grammar is None) != (matcher is None):
            raise ValueError("a sequence has a matcher if and only if it has a grammar")
        beyond = [token for token in sampling.logit_bias if token >= vocab_size]
        if beyond:
            raise SettingsError(
                f"logit_bias for token {beyond[0]}", f"tokens from 0 to {vocab_size - 1}", "leave it out"
            )
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.seed = seed
        self.matcher = matcher
        #: Tokens accepted so far.
        self.length = 0
        self._stop = array("i", sorted(token for token in stop if 0 <= token < vocab_size))
        self._counts_output = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._slots: dict[int, int] = {}
        self._rule = _rule_of(sampling)
        if sampling.repetition_penalty != 1:
            for token in prompt:
                self._occurred(token, 0)

    @property
    def finished(self) -> bool:
        """The grammar has ended with a stop token; nothing can follow."""
        return self.matcher is not None and self.matcher.finished

    def rule(self) -> kernel.Rule:
        """How the next token is chosen; good until the next token is accepted."""
        rule = self._rule
        rule.forbidden = self._stop if self.length < self.sampling.min_tokens else array("i")
        rule.allowed = None if self.matcher is None else self.matcher.mask()
        if not self.sampling.is_greedy:
            rule.uniform = uniform(self.seed, self.length)
        return rule

    def accept(self, token: int) -> None:
        """Count a token as the sequence's next.

        Raises
        ------
        ValueError
            The grammar doesn't allow it.
        """
        if self.matcher is not None and not self.matcher.accept(token):
            raise ValueError(f"token {token} isn't what the grammar allows after {self.length} tokens")
        if self._counts_output or self.sampling.repetition_penalty != 1:
            self._occurred(token, 1)
        self.length += 1

    def copy(self, seed: int) -> Sampler:
        """A branch with the same past, and other draws from here on."""
        matcher = None if self.matcher is None else self.matcher.copy()
        other = Sampler(self.sampling, (), self._stop, self.vocab_size, seed, matcher)
        other.length = self.length
        other._slots = dict(self._slots)
        other._rule.seen, other._rule.counts = self._rule.seen[:], self._rule.counts[:]
        return other

    def _occurred(self, token: int, in_output: int) -> None:
        if not 0 <= token < self.vocab_size:
            return
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._rule.seen):
            self._rule.seen.append(token)
            self._rule.counts.append(0)
        self._rule.counts[slot] += in_output


def choose(
    logits: Tensor | Sequence[Tensor], samplers: Sequence[Sampler], num_threads: int = 1
) -> list[Choice]:
    """The next token of each sequence; none is accepted yet.

    Parameters
    ----------
    logits : Tensor[n, vocab_size] or sequence of Tensor[vocab_size], float32
        On any device; chosen from on the CPU. Not changed.
    samplers : sequence of Sampler
        One per row, none twice.
    num_threads : int
        Threads that share the rows.

    Returns
    -------
    list of Choice
        Tokens don't depend on which rows stand together. A row has an error instead if its largest logit
        isn't finite (`CheckpointError`) or nothing may be chosen (`SettingsError`).

    Raises
    ------
    ValueError
        Rows of another size than the samplers' vocabulary, or another number of them.
    """
    rows = [row.to("cpu", torch.float32) for row in logits]
    for row, sampler in zip(rows, samplers, strict=True):
        if row.shape != (sampler.vocab_size,):
            raise ValueError(f"logits {list(row.shape)} for a vocabulary of {sampler.vocab_size}")
    found = kernel.choose(rows, [sampler.rule() for sampler in samplers], num_threads)
    return [_choice(chosen) for chosen in found]


def _rule_of(sampling: Sampling) -> kernel.Rule:
    biases = dict(sampling.logit_bias)
    return kernel.Rule(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.typical_p,
        sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
        array("i", biases), array("d", biases.values()), sampling.logprobs,
    )  # fmt: skip


def _choice(chosen: kernel.Chosen) -> Choice:
    if chosen.problem == "not finite":
        return Choice(
            -1,
            error=CheckpointError(
                "logits that are infinite or no numbers",
                "finite logits",
                "check the checkpoint with `evaluate`",
            ),
        )
    if chosen.problem == "nothing left":
        return Choice(
            -1,
            error=SettingsError(
                "a place where grammar, logit_bias and min_tokens leave no token",
                "at least one token that may follow",
                "set min_tokens lower, or allow more in the grammar",
            ),
        )
    if chosen.logprob is None:
        return Choice(chosen.token)
    return Choice(chosen.token, TokenLogprob(chosen.token, chosen.logprob, chosen.top))
