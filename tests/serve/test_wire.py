"""Messages arrive whole however the bytes are cut, or the connection is given up."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.errors import CheckpointError, EngineError
from tailorbird.serve.wire import (
    MESSAGE_LIMIT,
    Connection,
    Unpacker,
    WireError,
    error_from_wire,
    error_to_wire,
    pack,
    read_messages,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63),
    (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 99), inner),
    max_leaves=20,
)  # fmt: skip


@given(st.lists(values, max_size=5), st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=150, deadline=None)
def test_messages_survive_any_cuts(messages: list[Any], cuts: list[int]) -> None:
    stream = b"".join(map(pack, messages))
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    unpacker = Unpacker()
    found = [
        message for start, end in itertools.pairwise(edges) for message in unpacker.feed(stream[start:end])
    ]
    unpacker.close()
    assert found == messages


@given(values, st.data())
@settings(max_examples=100, deadline=None)
def test_a_message_that_is_cut_short_is_an_error_and_nothing_of_it_is_used(value: Any, data: Any) -> None:
    stream = pack(value)
    unpacker = Unpacker()
    assert unpacker.feed(stream[: data.draw(st.integers(1, len(stream) - 1))]) == []
    with pytest.raises(WireError, match="ended"):
        unpacker.close()


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_messages_raise_nothing_else(data: bytes) -> None:
    unpacker = Unpacker(limit=50)
    try:
        unpacker.feed(data)
        unpacker.close()
    except WireError:
        return
    # What was accepted is a sequence of whole messages.
    assert len(data) == sum(4 + size for size in _sizes(data))


def _sizes(data: bytes) -> list[int]:
    found, start = [], 0
    while start < len(data):
        found.append(struct.unpack_from(">I", data, start)[0])
        start += 4 + found[-1]
    return found


def test_a_message_above_the_limit_is_refused_by_its_length_alone() -> None:
    with pytest.raises(WireError, match="at most 10"):
        Unpacker(limit=10).feed(struct.pack(">I", 11))
    with pytest.raises(WireError, match="can be sent"):
        pack(bytes(MESSAGE_LIMIT + 1))


def test_the_blocking_end_tells_nothing_yet_from_the_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(ours)
        assert connection.receive(wait=False) == []
        theirs.sendall(pack("a") + pack("b") + pack("c")[:3])
        assert connection.receive(wait=True) == ["a", "b"]
        assert connection.receive(wait=False) == []
        theirs.sendall(pack("c")[3:])
        theirs.shutdown(socket.SHUT_WR)
        assert connection.receive(wait=True) == ["c"]
        assert connection.receive(wait=True) is None
        connection.send({"x": [1]})
        assert Unpacker().feed(theirs.recv(100)) == [{"x": [1]}]


def test_the_asynchronous_end_raises_where_the_last_message_is_cut() -> None:
    async def read() -> list[Any]:
        reader = asyncio.StreamReader()
        reader.feed_data(pack(1) + pack(2) + b"\0")
        reader.feed_eof()
        messages = read_messages(reader)
        found = [await anext(messages), await anext(messages)]
        with pytest.raises(WireError):
            await anext(messages)
        return found

    assert asyncio.run(read()) == [1, 2]


def test_errors_raised_on_purpose_travel_as_they_are_and_others_lose_their_text() -> None:
    sent = CheckpointError("a", "b", "c")
    arrived = error_from_wire(error_to_wire(sent))
    assert type(arrived) is CheckpointError
    assert arrived.args == sent.args
    other = error_from_wire(error_to_wire(ValueError("the prompt")))
    assert type(other) is EngineError
    assert "ValueError" in str(other)
    assert "the prompt" not in str(other)
