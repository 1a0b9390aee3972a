"""Work that ends when its client leaves, and answers sent as server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tailorbird.errors import TailorbirdError
from tailorbird.serve.api.failures import CLIENT_GONE, ApiError, ClientGone, from_error

T = TypeVar("T")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Parameters
    ----------
    receive : ASGI receive
        Of a request whose body was read.
    work : coroutine

    Raises
    ------
    ClientGone
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Any) -> bytes:
    """One event that carries JSON."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends what an iterator yields as events, then ``[DONE]``.

    An error that comes when the stream has begun is its last event, in OpenAI's shape, and no ``[DONE]``
    follows. A client that leaves closes the iterator.

    Parameters
    ----------
    values : async generator
    facts : dict
        What the log tells of the request; gets the status that the client can't be told any more.
    """

    def __init__(self, values: AsyncGenerator[Any, None], facts: dict[str, Any]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._values = values
        self._facts = facts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with contextlib.suppress(ClientGone):
            await unless_gone(receive, self._send(send))
            return
        self._facts["status"] = CLIENT_GONE

    async def _send(self, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with contextlib.aclosing(self._values) as values:
                async for value in values:
                    await body(event(value))
        except (ApiError, TailorbirdError) as error:
            told = error if isinstance(error, ApiError) else from_error(error)
            self._facts["status"] = told.status
            await body(event(told.body()), more=False)
        else:
            await body(b"data: [DONE]\n\n", more=False)
