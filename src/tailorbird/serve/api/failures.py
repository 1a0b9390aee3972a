"""Errors as OpenAI's clients know them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tailorbird.errors import (
    ContextExceeded,
    EngineError,
    GateRefused,
    TailorbirdError,
    UnknownAdapter,
    UserError,
)

#: What the log calls the status of a client that left before its answer was complete.
CLIENT_GONE = 499


class ClientGone(Exception):
    """The client closed the connection before its answer was complete; nobody is there to be told."""


class ApiError(Exception):
    """What a client is told instead of an answer.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
    code : str or None
        For programs.
    param : str or None
        The field at fault.
    headers : mapping, optional
        Added to the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent as JSON."""
        return {
            "error": {
                "message": self.message,
                "type": _kind(self.status),
                "param": self.param,
                "code": self.code,
            }
        }


class EngineLost(ApiError):
    """The engine died in the middle of an answer; the next one may be asked for it."""


def _kind(status: int) -> str:
    """What OpenAI calls errors with this status."""
    named = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    return named.get(status, "server_error" if status >= 500 else "invalid_request_error")


def busy(message: str, seconds: float, code: str = "rate_limit_exceeded") -> ApiError:
    """429, with when to come again."""
    return ApiError(429, message, code, headers={"Retry-After": str(max(1, round(seconds + 0.5)))})


def too_late(seconds: float) -> ApiError:
    """504, where an answer took longer than it may."""
    return ApiError(504, f"no complete answer after {seconds:g} seconds", "timeout")


def from_error(error: TailorbirdError) -> ApiError:
    """400 for a user's mistake, 404 for an adapter that has gone, 409 for what a gate refuses, 503 for an
    engine that has gone, else 500."""
    if isinstance(error, UnknownAdapter):
        return ApiError(404, str(error), "model_not_found", "model")
    if isinstance(error, ContextExceeded):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, UserError):
        return ApiError(400, str(error), "invalid_value")
    if isinstance(error, GateRefused):
        return ApiError(409, str(error), "gate_refused")
    if isinstance(error, EngineError):
        return ApiError(503, str(error), "engine_error", headers={"Retry-After": "5"})
    return ApiError(500, str(error), "internal_error")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """A body that isn't what it should be; values aren't repeated.

    Parameters
    ----------
    errors : sequence of mappings
        As pydantic lists them, with `loc` and `msg`.
    """
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"][1:])[:200]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON (character {first['loc'][-1]})", "invalid_json")
    if not param:
        return ApiError(
            400, "the body is no JSON object; send one, with Content-Type: application/json", "invalid_body"
        )
    return ApiError(400, f"{param}: {first['msg']}", "invalid_type", param)
