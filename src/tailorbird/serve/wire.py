"""Messages over a stream socket: four bytes of length, big-endian, then that many bytes of MessagePack.

A message arrives whole or not at all: one that is cut short, too long or no MessagePack raises, and nothing
of it is used (https://github.com/msgpack/msgpack/blob/master/spec.md).
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgpack

from tailorbird import errors
from tailorbird.errors import EngineError, TailorbirdError

if TYPE_CHECKING:
    from asyncio import StreamReader

#: Most bytes of one message, without its length.
MESSAGE_LIMIT = 64 << 20
_LENGTH = struct.Struct(">I")
_READ = 1 << 16


class WireError(ConnectionError):
    """What came over the socket is no sequence of messages; the connection is of no more use."""


def pack(message: Any) -> bytes:
    """The bytes that carry a message.

    Parameters
    ----------
    message : plain values
        None, numbers, texts, bytes, lists, and dicts of them.

    Raises
    ------
    WireError
        It is longer than `MESSAGE_LIMIT`.
    """
    body = msgpack.packb(message)
    if len(body) > MESSAGE_LIMIT:
        raise WireError(f"a message of {len(body)} bytes, at most {MESSAGE_LIMIT} can be sent")
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Turns bytes, cut anywhere, back into messages.

    Parameters
    ----------
    limit : int
        Most bytes of a message; a longer one is refused when its length is read, before it is stored.
    """

    def __init__(self, limit: int = MESSAGE_LIMIT) -> None:
        self._limit = limit
        self._held = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Take bytes; return the messages that they complete.

        Raises
        ------
        WireError
            A length above the limit, or a body that is no MessagePack.
        """
        self._held += data
        found, start = [], 0
        while len(self._held) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held, start)
            if length > self._limit:
                raise WireError(f"a message of {length} bytes, at most {self._limit} are taken")
            end = start + _LENGTH.size + length
            if len(self._held) < end:
                break
            found.append(_body(bytes(self._held[start + _LENGTH.size : end])))
            start = end
        del self._held[:start]
        return found

    def close(self) -> None:
        """Say that no more bytes come.

        Raises
        ------
        WireError
            Part of a message is still held.
        """
        if self._held:
            raise WireError(f"the connection ended {len(self._held)} bytes into a message")


class Connection:
    """The engine's end of the socket; blocking.

    Parameters
    ----------
    socket : socket.socket
        A connected stream socket.
    """

    def __init__(self, socket: socket.socket) -> None:
        self._socket = socket
        self._unpacker = Unpacker()
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Send one message whole, from any thread; raises `ConnectionError` where nobody listens any more."""
        with self._sending:
            self._socket.sendall(pack(message))

    def wait(self, seconds: float) -> None:
        """Wait until something arrives or the other end closes, at most so long."""
        select.select([self._socket], [], [], seconds)

    def receive(self, wait: bool) -> list[Any] | None:
        """The messages that have arrived.

        Parameters
        ----------
        wait : bool
            Wait until there is at least one.

        Returns
        -------
        list or None
            None when the other end has closed.

        Raises
        ------
        WireError
            As `Unpacker`.
        """
        found: list[Any] = []
        flags = 0 if wait else socket.MSG_DONTWAIT
        while True:
            try:
                data = self._socket.recv(_READ, flags)
            except BlockingIOError:
                return found
            if not data:
                self._unpacker.close()
                return found or None
            found += self._unpacker.feed(data)
            if found:
                flags = socket.MSG_DONTWAIT


async def read_messages(reader: StreamReader) -> AsyncIterator[Any]:
    """Messages as they arrive, until the other end closes; raises as `Unpacker`."""
    unpacker = Unpacker()
    while data := await reader.read(_READ):
        for message in unpacker.feed(data):
            yield message
    unpacker.close()


def error_to_wire(error: Exception) -> list[str]:
    """An error as plain values; one that wasn't raised on purpose becomes an `EngineError`, without text."""
    if isinstance(error, TailorbirdError):
        return [type(error).__name__, error.given, error.expected, error.remedy]
    return [
        EngineError.__name__,
        f"the engine failed with {type(error).__name__}",
        "an engine that goes on",
        "look at the server's log",
    ]


def error_from_wire(message: list[str]) -> TailorbirdError:
    """The error that `error_to_wire` made plain."""
    name, given, expected, remedy = message
    kind = getattr(errors, name, EngineError)
    return kind(given, expected, remedy)


def _body(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except Exception as error:  # msgpack raises ValueError, RecursionError and kinds of its own
        raise WireError(f"a message that is no MessagePack: {type(error).__name__}") from error
