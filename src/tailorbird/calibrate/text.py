"""Tokens: from documents to windows for calibration and for measuring.

Both kinds of windows come from all over the text. Those for calibration are drawn by a seed; held-out ones
always lie at the same places, so that two runs over the same text measure the same thing. How documents are
read and divided stands in `documents`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailorbird.calibrate.documents import Document, check_disjoint, read_documents, split_held_out
from tailorbird.errors import SettingsError, TextError

__all__ = [
    "Document",
    "Windows",
    "check_disjoint",
    "held_out_windows",
    "read_documents",
    "split_held_out",
    "token_windows",
]

LARGEST_PIECE = 1 << 18  # characters that are encoded at once
OVERSAMPLING = 4  # times as many tokens are encoded as windows are drawn from
HELD_OUT_REACH = 64  # times as many tokens are encoded as held-out windows are chosen from
UNKNOWN_SHARE = 0.2  # of the tokens, above which the text doesn't suit the tokenizer


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows of equal length.

    Attributes
    ----------
    ids : Tensor, int64
        ``[n, length]``.
    source : str
        Where the text came from.
    documents : int
        Documents that they hold tokens of.
    warnings : tuple of str
        What the user should know about this text.
    """

    ids: Tensor
    source: str
    documents: int = 0
    warnings: tuple[str, ...] = ()
    _held: tuple[tuple[int, ...], ...] = field(default=(), repr=False)  # numbers of each window's documents

    @classmethod
    def from_ids(cls, ids: Tensor, source: str) -> Windows:
        """Windows ``[n, length]`` that come from no document, such as sampled ones; each counts as one."""
        return cls(ids.to(torch.long), source, ids.shape[0], (), tuple((i,) for i in range(ids.shape[0])))

    @property
    def length(self) -> int:
        """Tokens per window."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.ids.numel()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the length and all ids, hex: equal exactly for equal windows in equal order."""
        digest = hashlib.sha256(f"{self.length}:".encode())
        digest.update(self.ids.contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def halves(self) -> tuple[Windows, Windows]:
        """Two halves that share no window, to see how much results depend on the text drawn.

        Raises
        ------
        TextError
            If there is only one window.
        """
        if len(self.ids) < 2:
            raise TextError(
                f"{self.source} gives a single window of {self.length} tokens",
                "two or more, to compare halves",
                "give more text or shorter windows",
            )
        middle = (len(self.ids) + 1) // 2
        return self._part(slice(0, middle)), self._part(slice(middle, None))

    def _part(self, rows: slice) -> Windows:
        held = self._held[rows]
        return Windows(self.ids[rows], self.source, len(set().union(*held)), self.warnings, held)


def token_windows(
    documents: Sequence[Document], tokenizer: Any, length: int, count: int | None = None, seed: int = 0
) -> Windows:
    """Windows for calibration, drawn from all over the text.

    The documents are joined in order, a separator between them (begin token where the tokenizer sets one
    itself, else end token, else begin token, else none), and cut into windows without overlap. A
    tokenizer that begins every text with a begin token has it at the start of every window. Where there
    are more windows than `count`, one is drawn at random from each of `count` equal stretches.

    Parameters
    ----------
    documents : sequence of Document
    tokenizer : transformers tokenizer
    length : int
        Tokens per window, at least 2.
    count : int or None
        At most so many windows; None takes all.
    seed : int
        Decides which text is drawn where not all is needed, and the order of the windows.

    Returns
    -------
    Windows
        ``[n, length]`` with n ≤ `count`; one shorter window where there is too little text for one.

    Raises
    ------
    TextError
        If the text gives fewer than two tokens, or always the same one.
    """
    random = np.random.default_rng(seed)
    pieces = list(_pieces(documents))
    wanted = None if count is None else OVERSAMPLING * count * length
    stretches = _stretches(pieces, 8 * length)
    order = [index for i in random.permutation(len(stretches)) for index in stretches[int(i)]]
    encoded: dict[int, Tensor] = {}
    encoder = _Encoder(tokenizer)
    found = 0
    for batch in _batches(order, pieces):
        for index, ids in zip(batch, encoder.encode([pieces[i].text for i in batch]), strict=True):
            encoded[index] = ids
            found += len(ids)
        if wanted is not None and found >= wanted:
            break
    chosen = sorted(encoded)
    stream = encoder.join([pieces[i] for i in chosen], [encoded[i] for i in chosen])
    rows = encoder.cut(stream, length)
    if count is not None and len(rows) > count:
        edges = [i * len(rows) // count for i in range(count + 1)]
        rows = [rows[int(random.integers(a, b))] for a, b in itertools.pairwise(edges)]
    rows = [rows[int(i)] for i in random.permutation(len(rows))]
    return encoder.windows(stream, rows, _source(documents))


def held_out_windows(
    documents: Sequence[Document], tokenizer: Any, length: int, max_tokens: int = 32_768
) -> Windows:
    """Windows to measure on: without overlap, in order, spread evenly over the text.

    Joined and cut as in `token_windows`; parts of one text that follow each other are one text. Where there
    are more windows than fit into `max_tokens`, the middle one of each of equal stretches is taken. Text
    beyond `HELD_OUT_REACH` times `max_tokens` isn't looked at.

    Parameters
    ----------
    documents : sequence of Document
    tokenizer : transformers tokenizer
    length : int
        Tokens per window, at least 2.
    max_tokens : int
        No more than so many tokens in all.

    Raises
    ------
    TextError
        As `token_windows`.
    """
    length = min(length, max_tokens)
    encoder = _Encoder(tokenizer)
    pieces = list(_pieces(documents))
    taken: list[Tensor] = []
    for batch in _batches(range(len(pieces)), pieces):
        taken += encoder.encode([pieces[i].text for i in batch])
        if encoder.counted >= HELD_OUT_REACH * max_tokens:
            break
    stream = encoder.join(pieces[: len(taken)], taken)
    rows = encoder.cut(stream, length)
    count = min(len(rows), max_tokens // length)
    rows = [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]
    return encoder.windows(stream, rows, _source(documents))


def _source(documents: Sequence[Document]) -> str:
    """The files of the documents, at most three by name."""
    files = list(dict.fromkeys(re.sub(r", (?:line|row) [0-9]+$", "", d.source) for d in documents))
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


@dataclass(frozen=True)
class _Piece:
    """What is encoded at once: a document or, of a long one, a stretch that ends at white space."""

    text: str
    document: int
    goes_on: bool  # where the piece before it ends
    index: int  # among all pieces


def _pieces(documents: Sequence[Document]) -> Iterator[_Piece]:
    index = 0
    for number, document in enumerate(documents):
        before = documents[number - 1] if number else None
        goes_on = before is not None and before.source == document.source and before.part + 1 == document.part
        start = 0
        while start < len(document.text):
            end = start + LARGEST_PIECE
            if end < len(document.text):
                spaces = [document.text.rfind(space, start + 1, end) for space in ("\n", " ")]
                end = spaces[0] if spaces[0] > start else spaces[1] if spaces[1] > start else end
            yield _Piece(document.text[start:end], number, goes_on, index)
            index += 1
            goes_on, start = True, end


def _stretches(pieces: Sequence[_Piece], characters: int) -> list[range]:
    """Indices of pieces that go on one after the other, so many that a few windows fit into `characters`."""
    starts: list[int] = []
    size = 0
    for piece in pieces:
        if not piece.goes_on or size >= characters:
            starts.append(piece.index)
            size = 0
        size += len(piece.text)
    return [range(a, b) for a, b in itertools.pairwise([*starts, len(pieces)])]


def _batches(order: Iterable[int], pieces: Sequence[_Piece]) -> Iterator[list[int]]:
    """Indices of pieces in the order given, together about as long as the largest piece."""
    batch: list[int] = []
    size = 0
    for index in order:
        batch.append(index)
        size += len(pieces[index].text)
        if size >= LARGEST_PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _Stream:
    """All tokens in a row, and for each the number of its document."""

    ids: Tensor
    documents: Tensor


class _Encoder:
    """Encodes pieces, joins them, cuts windows, and watches what the tokenizer makes of the text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        with_begin = begin is not None and self._ids(["a"], special=True)[0][:1] == [begin]
        #: stands at the start of every window, as the tokenizer itself would have it
        self.begin = begin if with_begin else None
        self.separator = begin if with_begin or end is None else end
        self.counted = self.unknown = 0
        self.distinct: set[int] = set()

    def _ids(self, texts: list[str], special: bool = False) -> list[list[int]]:
        encoded = self.tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, verbose=False
        )
        return list(encoded["input_ids"])

    def encode(self, texts: list[str]) -> list[Tensor]:
        """Token ids of each text, int32, nothing added."""
        result = [torch.tensor(ids, dtype=torch.int32) for ids in self._ids(texts)]
        for ids in result:
            self.counted += len(ids)
            if self.tokenizer.unk_token_id is not None:
                self.unknown += int((ids == self.tokenizer.unk_token_id).sum())
            if len(self.distinct) < 2:
                self.distinct.update(ids.unique()[:2].tolist())
        return result

    def join(self, pieces: Sequence[_Piece], encoded: Sequence[Tensor]) -> _Stream:
        """One row of tokens; pieces that don't go on where the one before ended are kept apart."""
        ids: list[Tensor] = []
        documents: list[Tensor] = []
        last: _Piece | None = None
        for piece, tokens in zip(pieces, encoded, strict=True):
            apart = last is not None and not (piece.goes_on and piece.index == last.index + 1)
            if apart and self.separator is not None and tokens[:1].tolist() != [self.separator]:
                tokens = torch.cat([tokens.new_tensor([self.separator]), tokens])
            ids.append(tokens)
            documents.append(torch.full((len(tokens),), piece.document, dtype=torch.int32))
            last = piece
        empty = torch.empty(0, dtype=torch.int32)
        return _Stream(torch.cat([empty, *ids]), torch.cat([empty, *documents]))

    def cut(self, stream: _Stream, length: int) -> list[slice]:
        """Where windows without overlap lie; where there isn't text for one, a single shorter one.

        One that `windows` puts a begin token before is one token shorter.
        """
        if length < 2:
            raise SettingsError(f"windows of {length} tokens", "2 tokens or more", "choose longer windows")
        places: list[slice] = []
        position = 0
        while position < len(stream.ids):
            stop = position + length - self._lacks_begin(stream.ids[position])
            if stop > len(stream.ids) and position > 0:
                break
            places.append(slice(position, stop))
            position = stop
        return places

    def _lacks_begin(self, first: Tensor) -> bool:
        """Whether a window whose first token in the text is `first` gets a begin token before it."""
        return self.begin is not None and int(first) != self.begin

    def _with_begin(self, ids: Tensor) -> Tensor:
        return torch.cat([ids.new_tensor([self.begin]), ids]) if self._lacks_begin(ids[0]) else ids

    def windows(self, stream: _Stream, places: list[slice], source: str) -> Windows:
        """The windows at these places, if a model can be measured or calibrated on them."""
        if self.counted == 0:
            raise TextError(f"{source or 'the text'} holds no tokens", "some text", "give another text")
        if len(self.distinct) < 2:
            raise TextError(
                f"everything in {source} becomes the one token {next(iter(self.distinct))}",
                "text that this model's tokenizer knows",
                "check that text and tokenizer belong together",
            )
        warnings = []
        if self.unknown > UNKNOWN_SHARE * self.counted:
            share = 100 * self.unknown / self.counted
            warnings.append(f"{share:.0f} % of the tokens of {source} are unknown to the tokenizer")
        ids = torch.stack([self._with_begin(stream.ids[place]) for place in places])
        held = tuple(tuple(stream.documents[place].unique().tolist()) for place in places)
        return Windows(ids.to(torch.long), source, len(set().union(*held)), tuple(warnings), held)
