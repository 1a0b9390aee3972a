"""In which order many requests that wait anyway are best served.

Those that begin alike follow each other, so that their beginning is read once. Beside that, requests that
read much and write little are mixed with those that write much: reading is bound by arithmetic and writing by
memory, and a step that does both uses both. After BlendServe (https://arxiv.org/abs/2411.16102): a tree of
prefixes whose branches are sorted by how much they read for what they write, and two scanners that take its
leaves from both ends so that what was taken has the density of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Characters of text that make a step down the tree; some fifty tokens.
CHUNK = 192


@dataclass(frozen=True)
class Weight:
    """What a request asks of the machine.

    Attributes
    ----------
    text : str
        Its prompt, for what it has in common with others.
    writes : int
        Tokens that it may write.
    """

    text: str
    writes: int


def blended(requests: Sequence[Weight]) -> list[int]:
    """Numbers of the requests in the order in which to begin them."""
    leaves = _leaves(requests, list(range(len(requests))), 0)
    reads = dict(_own_reads(requests, leaves))
    target = sum(reads.values()) / max(1, sum(request.writes for request in requests))
    order: list[int] = []
    left, right, read, written = 0, len(leaves) - 1, 0, 0
    while left <= right:
        dense = written == 0 or read / written < target  # the left end reads most for what it writes
        number = leaves[left] if dense else leaves[right]
        left, right = (left + 1, right) if dense else (left, right - 1)
        order.append(number)
        read, written = read + reads[number], written + requests[number].writes
    return order


def _leaves(requests: Sequence[Weight], numbers: list[int], depth: int) -> list[int]:
    """The tree's leaves from left to right, of requests that have `depth` chunks in common."""
    branches = _branches(requests, numbers, depth)
    while len(branches) == 1 and "" not in branches:  # texts may have very many in common
        depth += 1
        branches = _branches(requests, numbers, depth)
    ends = branches.pop("", [])
    parts = [[number] for number in ends]
    parts += [
        branch if len(branch) == 1 else _leaves(requests, branch, depth + 1) for branch in branches.values()
    ]
    parts.sort(key=lambda part: _density(requests, part, depth), reverse=True)
    return [number for part in parts for number in part]


def _branches(requests: Sequence[Weight], numbers: list[int], depth: int) -> dict[str, list[int]]:
    """The requests by their chunk at a depth; those that end within it under no chunk."""
    found: dict[str, list[int]] = {}
    for number in numbers:
        chunk = requests[number].text[depth * CHUNK : (depth + 1) * CHUNK]
        found.setdefault(chunk if len(chunk) == CHUNK else "", []).append(number)
    return found


def _density(requests: Sequence[Weight], numbers: Sequence[int], depth: int) -> float:
    """Characters read for a token written, beyond the chunks in common with all others."""
    reads = sum(len(requests[number].text) - depth * CHUNK for number in numbers)
    return reads / max(1, sum(requests[number].writes for number in numbers))


def _own_reads(requests: Sequence[Weight], leaves: Sequence[int]) -> list[tuple[int, int]]:
    """For each leaf the characters that it doesn't have in common with the one before."""
    found, before = [], ""
    for number in leaves:
        text = requests[number].text
        shared = 0
        while text[shared : shared + CHUNK] == before[shared : shared + CHUNK] and shared + CHUNK <= len(
            text
        ):
            shared += CHUNK
        found.append((number, len(text) - shared))
        before = text
    return found
