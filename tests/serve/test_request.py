"""Requests: what is refused, and that messages carry them unchanged."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tailorbird.errors import SettingsError
from tailorbird.serve.request import Grammar, Output, Request, Sampling, TokenLogprob


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": "1"}, {"top_p": 0}, {"top_p": 1.5},
        {"min_p": -1}, {"typical_p": 0}, {"repetition_penalty": 0}, {"presence_penalty": 3},
        {"frequency_penalty": -2.5}, {"top_k": -1}, {"top_k": 1.5}, {"min_tokens": -1}, {"logprobs": 21},
        {"seed": 1 << 64}, {"logit_bias": {-1: 0.0}}, {"logit_bias": {1: 101}}, {"top_k": True},
    ],
)  # fmt: skip
def test_sampling_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_requests_without_prompt_or_room_are_refused() -> None:
    for wrong in ({"prompt": ()}, {"max_tokens": 0}, {"n": 0}, {"n": 129}, {"max_tokens": -5}):
        with pytest.raises(SettingsError):
            Request(**({"id": "a", "prompt": (1,)} | wrong))
    with pytest.raises(SettingsError, match="kind"):
        Grammar("yaml")


def test_messages_carry_requests_and_outputs_unchanged() -> None:
    import msgpack

    sampling = Sampling(0.5, logit_bias={3: 1.5}, seed=-4, logprobs=2, grammar=Grammar("regex", "a+"))
    request = Request("a", (1, 2), 5, sampling, frozenset({7}), 2, "x", "me", -1)
    plain = Request("b", (1,))
    for sent in (request, plain):
        assert Request.from_wire(msgpack.unpackb(msgpack.packb(sent.to_wire()))) == sent
    output = Output("a", 1, (5, 6), (TokenLogprob(5, -0.5, ((5, -0.5),)),), "stop", None, 3)
    assert Output.from_wire(msgpack.unpackb(msgpack.packb(output.to_wire()))) == output
