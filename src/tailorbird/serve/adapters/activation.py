"""Activated LoRA: an adapter that acts from the tokens on that invoke it; those before are the model's alone.

    [ base ... base | invocation tokens ... rest of the prompt ... answer ]
                    ^ the adapter acts from here on

So keys and values before the invocation are those of the model without an adapter, and whoever has read them
with or without one can share them. Where a prompt has several invocations the last one counts, and where it
has none the adapter doesn't act at all, as in PEFT, which applies it from the first invocation token on.

Activated LoRA: https://arxiv.org/abs/2504.12397.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_adapted(tokens: Sequence[int], invocation: Sequence[int] | None) -> int | None:
    """The first token on which an adapter acts.

    Parameters
    ----------
    tokens : sequence of int
        A prompt.
    invocation : sequence of int or None
        Tokens that invoke the adapter; None for one that always acts.

    Returns
    -------
    int or None
        None where it doesn't act.
    """
    if invocation is None:
        return 0
    wanted, count = list(invocation), len(invocation)
    for start in range(len(tokens) - count, -1, -1):
        if tokens[start] == wanted[0] and list(tokens[start : start + count]) == wanted:
            return start
    return None
