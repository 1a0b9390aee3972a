"""Routes that change the adapters of a server: loaded and unloaded as vLLM names it
(https://docs.vllm.ai/en/latest/features/lora.html), published through a gate, and rolled back."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from tailorbird.errors import SettingsError, TextError
from tailorbird.serve.adapters.allowed import within
from tailorbird.serve.api.failures import ApiError, too_late
from tailorbird.serve.api.generation import Service
from tailorbird.serve.api.held_out import MOST_TOKENS, Scored, scored
from tailorbird.serve.api.schemas import (
    LoadAdapterRequest,
    PublishAdapterRequest,
    RollbackAdapterRequest,
    UnloadAdapterRequest,
)
from tailorbird.serve.api.streaming import unless_gone
from tailorbird.serve.held_out_file import read_file


def _check_right(http: Request) -> None:
    """Raise `ApiError` unless the key of a request may change adapters."""
    if not http.state.may_change_adapters:
        raise ApiError(
            403,
            "the right to change adapters is missing: only admin keys load, unload, publish and roll back",
            "missing_right",
        )


router = APIRouter(dependencies=[Depends(_check_right)])


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadAdapterRequest, http: Request) -> JSONResponse:
    """Serve another adapter, from the directory that the server allows."""
    service = _open_service(http)
    path = allowed_path(service.adapter_directory, body.lora_path, "lora_path")
    taken = [service.name] if body.load_inplace else service.models()
    if body.lora_name in taken:
        raise ApiError(409, f"`{body.lora_name}` is served already", "name_taken", "lora_name")
    await service.supervisor.load_adapter(body.lora_name, str(path))
    return JSONResponse({"loaded": body.lora_name, "models": service.models()})


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadAdapterRequest, http: Request) -> JSONResponse:
    """Serve an adapter no longer."""
    service = _open_service(http)
    _check_adapter(service, body.lora_name, "lora_name")
    await service.supervisor.unload_adapter(body.lora_name)
    return JSONResponse({"unloaded": body.lora_name, "models": service.models()})


@router.post("/v1/adapters/publish")
async def publish_adapter(body: PublishAdapterRequest, http: Request) -> JSONResponse:
    """Serve a new version of an adapter if it is no worse on held-out text than the one served now."""
    service = _open_service(http)
    path = allowed_path(service.adapter_directory, body.path, "path")
    if body.name == service.name:
        raise ApiError(409, f"`{body.name}` is the model, no adapter", "name_taken", "name")
    service.check_room(1)

    async def published() -> dict[str, Any]:
        try:
            async with asyncio.timeout(service.timeout):
                held_out = await _held_out(service, body.held_out)
                return await service.supervisor.publish_adapter(body.name, str(path), held_out)
        except TimeoutError:
            raise too_late(service.timeout) from None

    return JSONResponse(await unless_gone(http.receive, published()))


@router.post("/v1/adapters/rollback")
async def rollback_adapter(body: RollbackAdapterRequest, http: Request) -> JSONResponse:
    """Serve the version of an adapter before the one that is served."""
    service = _open_service(http)
    _check_adapter(service, body.name, "name")
    version = await service.supervisor.rollback_adapter(body.name)
    return JSONResponse({"name": body.name, "version": version})


async def _held_out(service: Service, given: str | list[Any]) -> list[Scored]:
    """Tokens of held-out text that came with a request, or lies in a file; raises `TextError`."""
    if isinstance(given, str):
        file = allowed_path(service.adapter_directory, given, "held_out", is_file=True)
        given = await asyncio.to_thread(read_file, file)
    most = min(service.context, int(service.supervisor.info["kv_tokens"]))
    found: list[Scored] = []
    total = 0
    for number, one in enumerate(given, 1):
        # One at a time, so that others' prompts needn't wait for all of them.
        parts = await service.in_thread(partial(scored, service.texts, one, number, most))
        total += sum(len(tokens) for tokens, _ in parts)
        if total > MOST_TOKENS:
            raise TextError(
                f"held-out text of more than {MOST_TOKENS} tokens",
                "less, as all of it is measured twice",
                "give a part of it",
            )
        found += parts
    return found


def _open_service(http: Request) -> Service:
    """The service; raises `ApiError` where it is about to stop."""
    service: Service = http.app.state.service
    service.check_open()
    return service


def _check_adapter(service: Service, name: str, param: str) -> None:
    """Raise `ApiError` unless adapters may be changed, and this is one that is served."""
    if service.adapter_directory is None:
        raise _closed()
    if service.adapter(name) is None:
        raise ApiError(400, f"`{name}` is the model, no adapter", "no_adapter", param)


def allowed_path(directory: Path | None, given: str, param: str, is_file: bool = False) -> Path:
    """What a client names inside `directory` when every link is followed.

    Parameters
    ----------
    directory : Path or None
        None allows nothing.
    given : str
        Absolute, or relative to `directory`.
    param : str
        The field that it was given in.
    is_file : bool
        Whether it must be a file, and not a directory.

    Raises
    ------
    ApiError
        403 outside of it, 404 where there is no such thing.
    """
    if directory is None:
        raise _closed()
    root = directory.resolve()
    try:
        path = within(root / given, root)
        there = path.is_file() if is_file else path.is_dir()
    except (SettingsError, OSError):  # a name may be too long
        path = root
    if path == root:
        raise ApiError(403, f"{param} leads out of the server's adapter directory", "forbidden", param)
    if not there:
        kind = "file" if is_file else "directory"
        raise ApiError(404, f"no such {kind} in the server's adapter directory", "not_found", param)
    return path


def _closed() -> ApiError:
    return ApiError(
        403, "this server changes no adapters; start it with --adapter-directory to allow it", "forbidden"
    )
