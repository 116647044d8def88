"""SageMaker's routes."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from lmi_multi.errors import LmiError, OptionError
from lmi_multi.prompts import as_list
from lmi_multi.serve import body, described, lmi, openai
from lmi_multi.serve.answer import Answer
from lmi_multi.serve.client import EngineClient
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.lmi import Invocation
from lmi_multi.serve.openai_bodies import ChatRequest, CompletionRequest
from lmi_multi.serve.service import Service, Wanted, first
from lmi_multi.serve.settings import ServeSettings
from lmi_multi.streaming import Chunk

_JSON_LINES, _SSE = described.JSON_LINES, described.EVENTS
_LINE, _EVENT = "%s\n", "data: %s\n\n"
_FORMS = {_SSE: _EVENT, _JSON_LINES: _LINE}


Invoke = Callable[[Request], Awaitable[Response]]


def router(
    invoke: Invoke, engine: EngineClient, settings: ServeSettings, draining: Callable[[], bool]
) -> APIRouter:
    """The routes. `draining` says whether the server is about to end."""
    routes = APIRouter()

    @routes.get(
        "/ping",
        tags=["SageMaker"],
        response_class=Response,
        responses={503: {"description": "not ready"}},
    )
    async def ping() -> Response:
        """200 once the model can answer, 503 before that and while there is no engine."""
        ok = engine.ready.is_set() and not draining()
        return Response(status_code=200 if ok else 503)

    @routes.get("/execution-parameters", tags=["SageMaker"])
    async def execution_parameters() -> dict[str, Any]:
        """What batch transform asks before it sends anything."""
        rows = engine.info.get("limits", {}).get("max_batch", 1)
        return {
            "MaxConcurrentTransforms": settings.max_concurrent_transforms or rows,
            "BatchStrategy": settings.batch_strategy,
            "MaxPayloadInMB": max(1, settings.max_body_bytes >> 20),
        }

    @routes.post("/invocations", tags=["SageMaker"], **description(settings))
    async def invocations(request: Request) -> Response:
        """Continue prompts, or embed them with an encoder. A body with `messages` or `prompt` is
        taken for a request in OpenAI's form. A script decides by itself what it takes."""
        return await invoke(request)

    return routes


def description(settings: ServeSettings, of_models: bool = False) -> dict[str, Any]:
    """What the OpenAPI page says of invocations; a script decides by itself what it takes.
    `of_models`: of one of several models."""
    if settings.entry_point is not None:
        return {"openapi_extra": {"requestBody": {"content": {"*/*": {"schema": {}}}}}}
    return {
        "openapi_extra": described.request(
            Invocation,
            CompletionRequest,
            ChatRequest,
            texts=("text/plain", _JSON_LINES),
        ),
        "responses": described.answers(
            described.INVOKED, described.PLAIN_ERROR, (_JSON_LINES, _SSE), of_models
        ),
    }


def invoker(service: Service, settings: ServeSettings) -> Invoke:
    """What answers an invocation of a model."""

    async def invoke(request: Request) -> Response:
        data = await body.read(request, settings.max_body_bytes)
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        if kind in (_JSON_LINES, "application/x-jsonlines", "application/jsonl"):
            return await _lines(service, data, request)
        if kind == "text/plain":
            value: Any = {"inputs": _text(data)}
        else:
            value = body.parse(data)
        if isinstance(value, dict) and "messages" in value:
            return await openai.chat_completion(service, value, request)
        if isinstance(value, dict) and "prompt" in value:
            return await openai.completion(service, value, request)
        asked = body.check(Invocation, value)
        return await _invoke(service, asked, request, _form(asked, request, settings))

    return invoke


async def _invoke(
    service: Service, asked: Invocation, request: Request, form: str | None
) -> Response:
    """`form`: how a line of a stream looks; None for a whole answer."""
    if service.is_encoder:
        return JSONResponse(await _embeddings(service, asked, request))
    if form is not None:
        options, _ = lmi.options(asked.parameters)
        prompts = as_list(asked.inputs)
        if len(prompts) != 1 or options.get("num_return_sequences", 1) != 1:
            raise HttpError(
                400, "stream is True; allowed: with one prompt and one answer", "stream"
            )
        options.setdefault("logprobs", 0)
        wanted = await service.wanted(prompts, options, lmi.NEW_TOKENS)
        chunks = await first(service.stream(wanted), request)
        kind = _SSE if form == _EVENT else _JSON_LINES
        return StreamingResponse(_events(chunks, wanted[0], form), media_type=kind)
    [shown] = await _generated(service, [asked], request)
    return JSONResponse(shown)


async def _generated(service: Service, asked: Sequence[Invocation], request: Request) -> list[Any]:
    """Whole answers to several bodies, which run beside each other."""
    wanted: list[list[Wanted]] = []
    detailed: list[bool] = []
    for one in asked:
        options, details = lmi.options(one.parameters)
        if details:
            options.setdefault("logprobs", 0)
        wanted.append(await service.wanted(as_list(one.inputs), options, lmi.NEW_TOKENS))
        detailed.append(details)
    found = iter(await service.answers([w for own in wanted for w in own], request))
    results: list[Any] = []
    for one, own, details in zip(asked, wanted, detailed, strict=True):
        shown = [
            lmi.shown(answer, len(prompt.ids), service.tokenizer, details)
            for prompt in own
            for answer in next(found)
        ]
        results.append(shown[0] if one.single and len(shown) == 1 else shown)
    return results


def _form(asked: Invocation, request: Request, settings: ServeSettings) -> str | None:
    """How a line of the stream looks that is wanted; None if none is.

    The request's `stream` decides, else its Accept, or the default one, else the settings.
    """
    accept = request.headers.get("accept", "*/*")
    if accept == "*/*":
        accept = settings.default_accept or ""
    named = next((form for kind, form in _FORMS.items() if kind in accept), None)
    formatted = {"sse": _EVENT, "jsonlines": _LINE}.get(settings.output_formatter)
    wanted = asked.stream
    if wanted is None:
        wanted = bool(named or formatted or settings.enable_streaming)
        if "application/json" in accept.split(","):
            wanted = False
    return (named or formatted or _LINE) if wanted else None


async def _lines(service: Service, data: bytes, request: Request) -> Response:
    """Batch transform's records, one JSON object a line; the answers in the same order."""
    asked = [
        _line(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()
    ]
    if not asked:
        raise HttpError(400, "the body has no lines")
    if service.is_encoder:
        shown = [await _embeddings(service, one, request) for one in asked]
    else:
        service.check_prompts(sum(len(as_list(one.inputs)) for one in asked))
        shown = await _generated(service, asked, request)
    lines = [bytes(JSONResponse(one).body) for one in shown]
    return Response(b"\n".join(lines) + b"\n", media_type=_JSON_LINES)


def _line(number: int, line: bytes) -> Invocation:
    """One line's body. Raises HttpError 400, which names the line."""
    try:
        asked = body.check(Invocation, body.parse(line))
        if asked.stream:
            raise HttpError(400, "stream is True; allowed: false among lines", "stream")
        lmi.options(asked.parameters)
    except (HttpError, OptionError) as error:
        found = error if isinstance(error, HttpError) else HttpError.of(error)
        raise HttpError(400, f"line {number}: {found.message}", found.param) from None
    return asked


async def _embeddings(service: Service, asked: Invocation, request: Request) -> Any:
    parameters = lmi.pooling(asked.parameters)
    vectors, _ = await service.embed(as_list(asked.inputs), request, **parameters)
    return vectors[0] if asked.single else vectors


async def _events(
    found: AsyncGenerator[list[Chunk]], wanted: Wanted, form: str
) -> AsyncIterator[str]:
    """A line for each token; the last one has the whole text and details beside it."""
    answer = Answer(wanted.text)
    try:
        async for chunks in found:
            lines = []
            for chunk in chunks:
                answer.add(chunk)
                lines += lmi.events(chunk, answer, len(wanted.ids))
            yield "".join(form % json.dumps(line) for line in lines)
    except (LmiError, HttpError) as error:
        failure = error if isinstance(error, HttpError) else HttpError.of(error)
        yield form % json.dumps({"error": failure.message, "code": failure.status})


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is no UTF-8 at byte {error.start}") from None
