"""A running server's adapters, changed over HTTP; its errors become those of this package again."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from tailorbird.errors import EngineError, GateRefused, ResourceError, SettingsError, TailorbirdError

#: What divides the parts of an error in a server's message.
_EXPECTED, _REMEDY = " · expected: ", " · "


class AdapterClient:
    """Asks a server that `tailorbird serve` started with ``--adapter-directory``.

    Parameters
    ----------
    url : str
        Such as ``http://127.0.0.1:8000``.
    key : str, optional
        One of the server's API keys.

    Raises
    ------
    SettingsError
        From here on: no such URL, or the server refuses key, name, directory or text.
    ResourceError
        No server answers.
    EngineError
        The server can't do it now.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError:
            self._host = None
        if self._host is None or parts.scheme not in ("http", "https"):
            raise SettingsError(
                f"--url {url[:200]}", "a URL such as http://127.0.0.1:8000", "copy it from the server's log"
            )
        self._url = url
        self._secure = parts.scheme == "https"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def publish(self, name: str, path: str, held_out: list[Any]) -> dict[str, Any]:
        """Serve a new version if it is no worse on held-out text; ``name version loss loss_before``.

        Raises
        ------
        GateRefused
            It is worse; the message has both losses.
        """
        return self._ask("POST", "/v1/adapters/publish", {"name": name, "path": path, "held_out": held_out})

    def rollback(self, name: str) -> dict[str, Any]:
        """Serve the version before; ``name version``."""
        return self._ask("POST", "/v1/adapters/rollback", {"name": name})

    def names(self) -> list[str]:
        """Names of the adapters that are served."""
        models = self._ask("GET", "/v1/models")["data"]
        return [model["id"] for model in models if model["parent"] is not None]

    def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The server's answer; it may take as long as the server lets it."""
        connect = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = connect(self._host or "", self._port)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers)
            answer = connection.getresponse()
            found = json.loads(answer.read())
            if not isinstance(found, dict):
                raise ValueError
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ResourceError(
                f"no tailorbird server answers at {self._url} ({type(error).__name__})",
                "the URL of one that runs",
                "start it with `tailorbird serve`, or correct --url",
            ) from error
        finally:
            connection.close()
        if answer.status != 200:
            raise _error(answer.status, found)
        return found


def _error(status: int, body: dict[str, Any]) -> TailorbirdError:
    """What a server means with an error in OpenAI's shape."""
    error = body.get("error")
    message = str(error.get("message")) if isinstance(error, dict) else f"status {status}"
    if status == 401:
        return SettingsError(
            "the server lets nobody in without a key of its own", "one of its API keys", "give it with --key"
        )
    code = error.get("code") if isinstance(error, dict) else None
    if code == "missing_right":
        return SettingsError(
            "a key without the right to change adapters",
            "one of the server's admin keys",
            "give it with --key",
        )
    given, _, rest = message.partition(_EXPECTED)
    expected, _, remedy = rest.rpartition(_REMEDY)
    kind = GateRefused if code == "gate_refused" else EngineError if status >= 500 else SettingsError
    return kind(
        given,
        expected or "a request that the server can serve",
        remedy or ("try again, and look at the server's log" if status >= 500 else "correct what it names"),
    )
