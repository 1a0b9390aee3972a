"""The routes: OpenAI's API (https://platform.openai.com/docs/api-reference), health, metrics, tokens, and one
page for people; those of adapters are in `adapters`."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

import tailorbird
from tailorbird.errors import SettingsError, TailorbirdError
from tailorbird.serve.api import adapters
from tailorbird.serve.api.access import Gate, Keys, Log, log_line
from tailorbird.serve.api.failures import ApiError, from_error, from_validation, too_late
from tailorbird.serve.api.generation import Generation, Piece, Service
from tailorbird.serve.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Generating,
    Message,
    TokenizeRequest,
    Tool,
)
from tailorbird.serve.api.shapes import ChatShape, CompletionShape, Shape
from tailorbird.serve.api.streaming import EventStream, unless_gone

#: Tokens of a plain completion that doesn't say how many, as OpenAI has it.
COMPLETION_TOKENS = 16
_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
router = APIRouter()


def create_app(
    service: Service,
    keys: Sequence[str] = (),
    per_minute: float | None = None,
    log: Log = log_line,
    admin_keys: Sequence[str] = (),
) -> FastAPI:
    """The API over an engine.

    Parameters
    ----------
    service : Service
        Its supervisor is started before the first request.
    keys : sequence of str
        API keys; none lets in everybody.
    per_minute : float, optional
        Requests that each key may send in a minute.
    log : callable
        As `log_line`.
    admin_keys : sequence of str
        As of `Keys`.
    """
    app = FastAPI(title="tailorbird", version=tailorbird.__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.include_router(adapters.router)
    app.add_middleware(
        Gate, keys=Keys(keys, admin_keys), per_minute=per_minute, log=log, count=service.metrics.count
    )
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(TailorbirdError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, TailorbirdError):
        error = from_error(error)
    elif isinstance(error, RequestValidationError):
        error = from_validation(error.errors())
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail), headers=error.headers)
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


def _service(http: Request) -> Service:
    service: Service = http.app.state.service
    return service


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, http: Request) -> Response:
    """Continue a conversation."""
    service = _service(http)
    adapter = service.adapter(body.model)
    prompt = await _chat_prompt(service, body.messages, body.usable_tools)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    stops = [*body.stops, *service.texts.chat_stops]
    generation = _generation(http, body, [prompt], limit, stops, adapter, body.top)
    tools = [tool.function.name for tool in body.usable_tools]
    shape = ChatShape(service.texts, generation.id, body.model, tools, _wants_usage(body))
    return await _respond(http, body, generation, shape)


@router.post("/v1/completions")
async def completions(body: CompletionRequest, http: Request) -> Response:
    """Continue texts."""
    service = _service(http)
    adapter = service.adapter(body.model)
    body.check()
    prompts = await service.prompts(body.prompt)
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    generation = _generation(http, body, prompts, limit, body.stops, adapter, body.logprobs)
    shape = CompletionShape(service.texts, generation.id, body.model, _wants_usage(body))
    return await _respond(http, body, generation, shape)


async def _chat_prompt(service: Service, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Tokens of a conversation; those around a text are the template's business where there is one."""
    plain = [message.for_template() for message in messages]
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    text = await service.in_thread(lambda: service.texts.chat(plain, described))
    return await service.encode(text, special=not service.texts.has_template)


def _generation(
    http: Request,
    body: Generating,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    stops: Sequence[str],
    adapter: str | None,
    logprobs: int | None,
) -> Generation:
    return Generation(
        _service(http),
        prompts,
        body.sampling(logprobs),
        max_tokens,
        1 if body.n is None else body.n,
        stops,
        adapter,
        http.state.tenant,
        body.beams(),
        body.written,
    )


def _wants_usage(body: Generating) -> bool:
    return bool(body.stream and body.stream_options and body.stream_options.include_usage)


async def _respond(http: Request, body: Generating, generation: Generation, shape: Shape) -> Response:
    """The answer, whole or as a stream; a refusal by the engine comes before the stream begins."""
    facts = http.state.facts
    facts["model"] = body.model
    if body.stream:
        pieces = _telling(generation, facts)
        first = await unless_gone(http.receive, _first(pieces))
        return EventStream(_chunks(first, pieces, generation, shape, _wants_usage(body)), facts)
    try:
        found = await unless_gone(http.receive, generation.whole())
    finally:
        _tell(generation, facts)
    return JSONResponse(shape.whole(found, generation.usage()))


async def _telling(generation: Generation, facts: dict[str, Any]) -> AsyncGenerator[Piece, None]:
    """The pieces; at their end the log is told how much it was."""
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                yield piece
    finally:
        _tell(generation, facts)


def _tell(generation: Generation, facts: dict[str, Any]) -> None:
    facts["prompt_tokens"] = generation.prompt_tokens
    facts["completion_tokens"] = generation.completion_tokens


async def _first(pieces: AsyncGenerator[Piece, None]) -> Piece:
    return await anext(pieces)


async def _chunks(
    first: Piece, rest: AsyncGenerator[Piece, None], generation: Generation, shape: Shape, with_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(rest):
        for chunk in shape.chunks(first):
            yield chunk
        async for piece in rest:
            for chunk in shape.chunks(piece):
                yield chunk
    if with_usage:
        yield shape.usage_chunk(generation.usage())


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingRequest, http: Request) -> Response:
    """One vector for each text."""
    service = _service(http)
    adapter = service.adapter(body.model)
    service.check_open()
    prompts = await service.prompts(body.input)
    for prompt in prompts:
        if not 1 <= len(prompt) <= service.context:
            raise SettingsError(
                f"an input of {len(prompt)} tokens", f"1 to {service.context} tokens", "cut it into parts"
            )

    async def vectors() -> list[list[float]]:
        service.check_room(1)
        try:
            async with asyncio.timeout(service.timeout):
                return [await service.supervisor.embed(prompt, adapter) for prompt in prompts]
        except TimeoutError:
            raise too_late(service.timeout) from None

    found = await unless_gone(http.receive, vectors())
    if body.dimensions not in (None, len(found[0])):
        raise SettingsError(f"dimensions {body.dimensions}", f"{len(found[0])}, the model's", "leave it out")
    tokens = sum(map(len, prompts))
    http.state.facts.update(model=body.model, prompt_tokens=tokens)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(vector, body.encoding_format)}
        for index, vector in enumerate(found)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


def _vector(values: Sequence[float], encoding: str | None) -> list[float] | str:
    """A vector as numbers, or as base64 of little-endian float32."""
    if encoding != "base64":
        return list(values)
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


@router.get("/v1/models")
async def models(http: Request) -> Response:
    """What can be asked for as `model`."""
    service = _service(http)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.models()]})


@router.get("/v1/models/{name:path}")
async def model(name: str, http: Request) -> Response:
    """One of them."""
    service = _service(http)
    service.adapter(name)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "tailorbird",
        "root": service.name,
        "parent": None if name == service.name else service.name,
        "max_model_len": service.context,
    }


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, http: Request) -> Response:
    """Tokens of a text, or of a conversation."""
    service = _service(http)
    if (body.prompt is None) == (body.messages is None):
        raise SettingsError("neither or both of prompt and messages", "one of them", "leave out the other")
    if body.messages is not None:
        tokens = await _chat_prompt(service, body.messages, [])
    else:
        tokens = await service.encode(body.prompt or "", body.add_special_tokens)
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": service.context})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, http: Request) -> Response:
    """Text of tokens."""
    service = _service(http)
    tokens = service.checked(body.tokens)
    return JSONResponse({"prompt": await service.in_thread(lambda: service.texts.decode(tokens))})


@router.get("/health/live")
async def live(http: Request) -> Response:
    """Whether the engine runs; the only route without a key."""
    return _health(_service(http).supervisor.ready)


@router.get("/health")
@router.get("/health/ready")
async def ready(http: Request) -> Response:
    """Whether requests are taken now, how the model runs and why not faster, and what the start took."""
    service = _service(http)
    how = {name: service.supervisor.info.get(name) for name in ("path", "note")}
    return _health(service.supervisor.ready and not service.draining, startup=service.startup, **how)


def _health(good: bool, **more: Any) -> Response:
    return JSONResponse({"status": "ok" if good else "unavailable"} | more, 200 if good else 503)


@router.get("/metrics")
async def metrics(http: Request) -> Response:
    """Numbers for Prometheus."""
    return Response(_service(http).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/status")
async def status(http: Request) -> Response:
    """Numbers for the page."""
    service = _service(http)
    return JSONResponse(
        {
            "ready": service.supervisor.ready and not service.draining,
            "models": service.models(),
            "chat_template": service.texts.has_template,
            "generated_tokens": service.metrics.generated,
            "in_flight": service.supervisor.in_flight,
            "info": {name: value for name, value in service.supervisor.info.items() if name != "adapters"},
            "stats": service.supervisor.stats,
        }
    )


@router.get("/")
async def page() -> Response:
    """A page for people: talk to a model, and see what the server does."""
    headers = {
        "Content-Security-Policy": _PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)
