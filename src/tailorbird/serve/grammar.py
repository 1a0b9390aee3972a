"""Text that must look like something: JSON, a JSON schema, a pattern, a grammar.

xgrammar (https://arxiv.org/abs/2411.15100) compiles a grammar for a tokenizer, and tells token by token which
may follow. It is imported when the first compiler is made.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.serve.json_schema import checked
from tailorbird.serve.pattern import held
from tailorbird.serve.request import Grammar

#: Bytes of compiled grammars that are kept for the next request, per compiler.
CACHE_BYTES = 64 << 20
#: Characters of a grammar, by kind; patterns with much choice take longest to compile.
MOST_TEXT = {"json": 0, "json_schema": 1 << 16, "regex": 1 << 12, "ebnf": 1 << 14}
#: White space between two parts of JSON; a model that can't find an end would write it for ever.
MOST_SPACES = 64

#: Time and line of source at the head of xgrammar's messages.
_ORIGIN = re.compile(r"^\[[\d:]+\] \S+: ")


class Compiler:
    """Compiles grammars for one tokenizer, and keeps them up to `CACHE_BYTES`; may be shared by threads.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    vocab_size : int
        Logits of a row; may differ from what the tokenizer knows.
    threads : int
        Threads that compile one grammar.

    Raises
    ------
    SettingsError
        xgrammar isn't installed, or can't read the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, threads: int = 1) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise SettingsError(
                "a grammar, without the package xgrammar", "xgrammar, which reads grammars",
                "install `tailorbird[serve]`",
            ) from error  # fmt: skip
        self.vocab_size = vocab_size
        self._xgrammar = xgrammar
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        except (ValueError, RuntimeError) as error:
            raise SettingsError(
                f"a tokenizer of {type(tokenizer).__name__}: {_message(error)}",
                "a tokenizer that xgrammar reads", "serve this model without grammars",
            ) from error  # fmt: skip
        self._compiler = xgrammar.GrammarCompiler(
            info, max_threads=threads, cache_enabled=True, cache_limit_bytes=CACHE_BYTES
        )

    @property
    def cached_bytes(self) -> int:
        """What the compiled grammars that are kept take."""
        return int(self._compiler.get_cache_size_bytes())

    def matcher(self, grammar: Grammar, stop: Collection[int] = ()) -> Matcher:
        """The start of a text; compiles the grammar unless it is kept.

        Python goes on in other threads meanwhile.

        Parameters
        ----------
        grammar : Grammar
        stop : collection of int
            Tokens that may follow where the text is complete, and never within it; the tokenizer's own end
            token unless given.

        Raises
        ------
        SettingsError
            The grammar is invalid, too long, not expressible, or no text fits it.
        """
        most = MOST_TEXT[grammar.kind]
        if len(grammar.text) > most:
            raise SettingsError(
                f"a {grammar.kind} of {len(grammar.text)} characters", f"at most {most}", "shorten it"
            )
        stop_tokens = sorted(token for token in stop if 0 <= token < self.vocab_size) or None
        try:
            compiled = self._compile(grammar)
            started = self._xgrammar.GrammarMatcher(compiled, override_stop_tokens=stop_tokens)
        except (ValueError, RuntimeError) as error:
            raise SettingsError(
                f"a {grammar.kind} that can't be compiled: {_message(error)}",
                f"a {grammar.kind} as xgrammar reads it", "correct it",
            ) from error  # fmt: skip
        matcher = Matcher(started, self.vocab_size)
        allowed = matcher.mask()
        if allowed is not None and not allowed.any():
            raise SettingsError(
                f"a {grammar.kind} that no text fits", "a grammar that some text fits", "correct it"
            )
        return matcher

    def _compile(self, grammar: Grammar) -> Any:
        if grammar.kind == "regex":
            return self._compiler.compile_regex(held(grammar.text))
        if grammar.kind == "ebnf":
            return self._compiler.compile_grammar(grammar.text)
        schema = "{}" if grammar.kind == "json" else checked(grammar.text)
        return self._compiler.compile_json_schema(schema, max_whitespace_cnt=MOST_SPACES)


class Matcher:
    """How far one text has come in its grammar; made by `Compiler.matcher`.

    Parameters
    ----------
    started : xgrammar.GrammarMatcher
    vocab_size : int
    length : int
        Tokens that it has accepted.
    """

    def __init__(self, started: Any, vocab_size: int, length: int = 0) -> None:
        self._matcher = started
        self._vocab_size = vocab_size
        self._length = length
        self._bits = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32)

    @property
    def finished(self) -> bool:
        """A stop token has ended the text."""
        return bool(self._matcher.is_terminated())

    @property
    def complete(self) -> bool:
        """The text so far is one that the grammar describes; more may still follow."""
        return self.finished or bool(self._matcher.is_completed())

    def mask(self) -> Tensor | None:
        """Which tokens may follow.

        Returns
        -------
        Tensor[ceil(vocab_size / 32)], int32, or None
            Bit ``t % 32`` of number ``t // 32`` stands for token `t`; good until the next call. None allows
            all.
        """
        if self.finished:
            self._bits.zero_()
        elif not self._matcher.fill_next_token_bitmask(self._bits):
            return None
        return self._bits[0]

    def accept(self, token: int) -> bool:
        """Go on by a token; whether the grammar allows it. If not, nothing changes."""
        if not 0 <= token < self._vocab_size or self.finished or not self._matcher.accept_token(token):
            return False
        self._length += 1
        return True

    def rollback(self, count: int) -> None:
        """Take back the last tokens accepted.

        Raises
        ------
        ValueError
            There are fewer.
        """
        if not 0 <= count <= self._length:
            raise ValueError(f"{count} tokens to take back of {self._length}")
        self._matcher.rollback(count)
        self._length -= count

    def copy(self) -> Matcher:
        """Another text with the same past."""
        return Matcher(self._matcher.fork(), self._vocab_size, self._length)


def _message(error: Exception) -> str:
    """The first line of xgrammar's message, without where in its source it arose."""
    return _ORIGIN.sub("", str(error)).strip().split("\n")[0]
