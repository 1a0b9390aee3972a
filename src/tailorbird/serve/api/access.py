"""The gate that every request passes: who asks, how often, how much; and what is written down of it.

Logs are one JSON object per line, without prompts, answers and keys.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tailorbird.serve.api.failures import CLIENT_GONE, ApiError, ClientGone, busy

#: The only route without a key: it says nothing but whether the engine runs.
OPEN_PATHS = frozenset({"/health/live"})
#: What others ask again and again: logged only where the answer is an error.
QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/status"})
#: Most bytes of a body, and seconds until it must be there.
BODY_LIMIT, BODY_SECONDS = 16 << 20, 60.0
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Log = Callable[..., None]


def log_line(event: str, **facts: Any) -> None:
    """Write one line of JSON on standard error; facts that are None are left out."""
    shown = {name: value for name, value in facts.items() if value is not None}
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z"
    print(json.dumps({"time": when, "event": event} | shown), file=sys.stderr, flush=True)


@dataclass
class TokenBucket:
    """Lets `per_minute` requests a minute through, and as many at once after a minute's rest.

    Parameters
    ----------
    per_minute : float
        Above 0.
    """

    per_minute: float
    level: float = field(init=False)
    filled: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.level = max(1.0, self.per_minute)

    def take(self, now: float) -> float:
        """Take one at `now` (seconds, never falling); seconds until there will be one, 0 if it was taken."""
        rate = self.per_minute / 60
        self.level = min(max(1.0, self.per_minute), self.level + (now - self.filled) * rate)
        self.filled = now
        if self.level >= 1:
            self.level -= 1
            return 0.0
        return (1 - self.level) / rate


class Keys:
    """The API keys that are let in, and what they may do.

    Parameters
    ----------
    keys : sequence of str
        None lets in everybody.
    admin_keys : sequence of str
        These are let in, too, and only these may change adapters; with none everybody who is let in may.
    """

    def __init__(self, keys: Sequence[str], admin_keys: Sequence[str] = ()) -> None:
        self._open = not keys
        self._admins = [_digest(key) for key in admin_keys]
        self._digests = [*(_digest(key) for key in keys), *self._admins]

    def tenant(self, authorization: str | None) -> str | None:
        """Who asks: the number of the key, from 1, admin keys after the others; None for strangers.

        Without keys there are no strangers, and who gives no admin key is called by an empty text.

        Parameters
        ----------
        authorization : str or None
            The header: ``Bearer KEY``, or ``Basic`` with the key as password, as browsers send it.
        """
        matches = _matches(authorization, self._digests)
        if any(matches):
            return str(matches.index(True) + 1)
        return "" if self._open else None

    def may_change_adapters(self, authorization: str | None) -> bool:
        """Whether who asks, by a header as `tenant` takes it, may load, unload, publish and roll back."""
        return not self._admins or any(_matches(authorization, self._admins))


def _matches(authorization: str | None, digests: Sequence[bytes]) -> list[bool]:
    """Which of the keys a header has."""
    given = _digest(_key_of(authorization or ""))
    # All are compared, so that the time tells nothing about which one was close.
    return [hmac.compare_digest(given, digest) for digest in digests]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_of(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


class Gate:
    """ASGI middleware around the whole API.

    Parameters
    ----------
    app : ASGI application
    keys : Keys
    per_minute : float or None
        Requests that each key may send with a body; None is without limit.
    log : callable
        As `log_line`.
    count : callable
        Called with route, status and seconds of each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        per_minute: float | None = None,
        log: Log = log_line,
        count: Callable[[str, int, float], None] = lambda route, status, seconds: None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._per_minute = per_minute
        self._log = log
        self._count = count
        self._buckets: dict[str, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI (https://asgi.readthedocs.io)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        stated = headers.get("x-request-id", "")
        id = stated if _REQUEST_ID.fullmatch(stated) else f"req-{uuid.uuid4().hex}"
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=id, facts=facts)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            scope["state"]["tenant"] = facts["tenant"] = self._admit(scope, headers)
            scope["state"]["may_change_adapters"] = self._keys.may_change_adapters(
                headers.get("authorization")
            )
            await self._app(scope, await _whole_body(headers, receive), answer)
        except ApiError as error:
            response = JSONResponse(error.body(), error.status, error.headers)
            await response(scope, receive, answer)
        except ClientGone:
            facts["status"] = CLIENT_GONE
        except Exception as error:
            self._log("failure", id=id, error=type(error).__name__, where=_frames(error))
            if status == 0:
                failure = ApiError(
                    500, f"an error of the server; its log has more under {id}", "internal_error"
                )
                await JSONResponse(failure.body(), failure.status)(scope, receive, answer)
            else:
                raise
        finally:
            seconds = time.monotonic() - started
            outcome = facts.pop("status", None) or status or CLIENT_GONE
            route = getattr(scope.get("route"), "path", "unknown")
            self._count(route, outcome, seconds)
            if outcome >= 400 or scope["path"] not in QUIET_PATHS:
                self._log(
                    "request",
                    id=id,
                    method=scope["method"],
                    path=scope["path"][:200],
                    status=outcome,
                    seconds=round(seconds, 4),
                    **facts,
                )

    def _admit(self, scope: Scope, headers: Headers) -> str:
        """Whose request this is.

        Raises
        ------
        ApiError
            401 for strangers, 429 for who asks too often.
        """
        if scope["path"] in OPEN_PATHS:
            return ""
        tenant = self._keys.tenant(headers.get("authorization"))
        if tenant is None:
            # Browsers ask for the key of the page, in a dialog; programs are told what they lack.
            scheme = 'Basic realm="tailorbird"' if scope["path"] == "/" else "Bearer"
            raise ApiError(
                401,
                "a missing or wrong API key; send the header `Authorization: Bearer KEY`",
                "invalid_api_key",
                headers={"WWW-Authenticate": scheme},
            )
        if self._per_minute is not None and scope["method"] == "POST":
            bucket = self._buckets.setdefault(tenant, TokenBucket(self._per_minute))
            wait = bucket.take(time.monotonic())
            if wait > 0:
                raise busy(f"more than {self._per_minute:g} requests a minute", wait)
        return tenant


async def _whole_body(headers: Headers, receive: Receive) -> Receive:
    """`receive`, with the body read already.

    Raises
    ------
    ApiError
        413 for a body that is too long, 408 for one that doesn't come, 400 for one that isn't Unicode.
    """
    length = headers.get("content-length", "0")
    too_long = ApiError(413, f"a body of more than {BODY_LIMIT} bytes", "body_too_large")
    if not length.isdecimal() or len(length) > 12 or int(length) > BODY_LIMIT:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > BODY_LIMIT:
                    raise too_long
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise ApiError(408, f"the body wasn't there after {BODY_SECONDS:g} seconds", "body_timeout") from None
    _check_text(bytes(body))
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return again


def _check_text(body: bytes) -> None:
    """Refuse JSON with half of a surrogate pair, which Python reads and no tokenizer can take.

    Raises
    ------
    ApiError
        400.
    """
    if not _SURROGATE.search(body):
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "a text with half of a surrogate pair", "invalid_unicode") from None
    except (ValueError, RecursionError):
        return  # whoever reads the JSON says what is wrong with it


def _frames(error: BaseException) -> list[str]:
    """Where an error came from, without its text, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-8:]]
