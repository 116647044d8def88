"""SageMaker's routes, with the request and answer shapes of DJL Serving's LMI containers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, StrictBool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from lmi_multi.errors import LmiError
from lmi_multi.options import GenerateOptions, TokenLogprob
from lmi_multi.prompts import as_list
from lmi_multi.serve import body, openai
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.service import Answer, Service, Wanted, first
from lmi_multi.serve.settings import ServeSettings
from lmi_multi.streaming import Chunk

NEW_TOKENS = 30  # LMI's default
_REASONS = {"eos": "eos_token", "length": "length", "stop": "stop_sequence"}
_NAMES = {"stop_sequences": "stop"}
_JSON_LINES, _SSE = "application/jsonlines", "text/event-stream"
_LINE, _EVENT = "%s\n", "data: %s\n\n"
_FORMS = {_SSE: _EVENT, _JSON_LINES: _LINE}


class Invocation(BaseModel):
    """The body of `/invocations`: prompts, and how to continue them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: str | list[str] | list[int] | list[list[int]]
    parameters: dict[str, Any] = {}
    stream: StrictBool | None = None


def router(service: Service, settings: ServeSettings, draining: Callable[[], bool]) -> APIRouter:
    """The routes. `draining` says whether the server is about to end."""
    routes = APIRouter()

    @routes.get("/ping", tags=["SageMaker"])
    async def ping() -> Response:
        """200 once the model can answer, 503 before that and while there is no engine."""
        ok = service.engine.ready.is_set() and not draining()
        return Response(status_code=200 if ok else 503)

    @routes.get("/execution-parameters", tags=["SageMaker"])
    async def execution_parameters() -> dict[str, Any]:
        """What batch transform asks before it sends anything."""
        rows = service.engine.info.get("limits", {}).get("max_batch", 1)
        return {
            "MaxConcurrentTransforms": settings.max_concurrent_transforms or rows,
            "BatchStrategy": settings.batch_strategy,
            "MaxPayloadInMB": max(1, settings.max_body_bytes >> 20),
        }

    schema = {"schema": Invocation.model_json_schema()}

    @routes.post(
        "/invocations",
        tags=["SageMaker"],
        openapi_extra={"requestBody": {"content": {"application/json": schema}}},
    )
    async def invocations(request: Request) -> Response:
        """Continue prompts, or embed them with an encoder. A body with `messages` or `prompt` is
        taken for a request in OpenAI's form."""
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

    return routes


async def _invoke(
    service: Service, asked: Invocation, request: Request, form: str | None
) -> Response:
    """`form`: how a line of a stream looks; None for a whole answer."""
    if service.is_encoder:
        return JSONResponse(await _embeddings(service, asked, request))
    options, details = _options(asked.parameters)
    several = not isinstance(asked.inputs, str) and not _is_ids(asked.inputs)
    prompts = as_list(asked.inputs)
    if form is not None:
        if len(prompts) != 1 or options.get("num_return_sequences", 1) != 1:
            raise HttpError(
                400, "stream is True; allowed: with one prompt and one answer", "stream"
            )
        options.setdefault("logprobs", 0)
        wanted = await service.wanted(prompts, options, NEW_TOKENS)
        chunks = await first(service.stream(wanted))
        kind = _SSE if form == _EVENT else _JSON_LINES
        return StreamingResponse(_events(chunks, wanted[0], form), media_type=kind)
    if details:
        options.setdefault("logprobs", 0)
    wanted = await service.wanted(prompts, options, NEW_TOKENS)
    answers = await service.answers(wanted, request)
    shown = [
        _shown(service, answer, own, details)
        for own, found in zip(wanted, answers, strict=True)
        for answer in found
    ]
    return JSONResponse(shown if several or len(shown) > 1 else shown[0])


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
    asked = [body.check(Invocation, body.parse(line)) for line in data.splitlines() if line.strip()]
    if not asked:
        raise HttpError(400, "the body has no lines")
    results = []
    for one in asked:
        answer = await _invoke(service, one, request, None)
        results.append(bytes(answer.body))
    return Response(b"\n".join(results) + b"\n", media_type=_JSON_LINES)


async def _embeddings(service: Service, asked: Invocation, request: Request) -> Any:
    known = {"pooling", "normalize"}
    if unknown := set(asked.parameters) - known:
        raise HttpError(
            400, f"unknown parameter {min(unknown)!r}; known: pooling, normalize", min(unknown)
        )
    one = isinstance(asked.inputs, str) or _is_ids(asked.inputs)
    prompts = as_list(asked.inputs)
    vectors, _ = await service.embed(prompts, request, **asked.parameters)
    return vectors[0] if one else vectors


def _options(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Our options, and whether details are wanted."""
    given = {_NAMES.get(name, name): value for name, value in parameters.items()}
    if len(given) < len(parameters):
        raise HttpError(400, "stop and stop_sequences are the same; allowed: one of them", "stop")
    details = given.pop("details", False)
    if not isinstance(details, bool):
        raise HttpError(400, f"details is {details!r:.80}; allowed: true or false", "details")
    # Sampling options beside an unset do_sample mean sampling there.
    asked = GenerateOptions.of({n: v for n, v in given.items() if n != "do_sample"})
    if given.get("do_sample") is None and asked.sampling_asked() and not asked.num_beams:
        given["do_sample"] = True
    return given, details


def _shown(service: Service, answer: Answer, wanted: Wanted, details: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"generated_text": answer.text}
    if answer.score is not None:
        shown["score"] = answer.score
    if service.tokenizer is None:
        shown["token_ids"] = answer.token_ids
    if details:
        shown["details"] = _details(answer, wanted) | {
            "tokens": [_token(service, entry) for entry in answer.logprobs]
        }
    return shown


def _details(answer: Answer, wanted: Wanted) -> dict[str, Any]:
    return {
        "finish_reason": _REASONS.get(answer.finish_reason, answer.finish_reason),
        "generated_tokens": len(answer.token_ids),
        "prompt_tokens": len(wanted.ids),
    }


def _token(service: Service, entry: TokenLogprob) -> dict[str, Any]:
    text = None
    if service.tokenizer is not None:
        text = service.tokenizer.decode([entry.token_id])
    return {"id": entry.token_id, "text": text, "log_prob": entry.logprob}


async def _events(chunks: AsyncGenerator[Chunk], wanted: Wanted, form: str) -> AsyncIterator[str]:
    """A line for each token; the last one has the whole text and details beside it."""
    answer = Answer(wanted.text)
    try:
        async for chunk in chunks:
            answer.add(chunk)
            events = _tokens(chunk)
            if chunk.finish_reason is not None:
                events = events or [{}]
                events[-1] |= {"generated_text": answer.text, "details": _details(answer, wanted)}
            for event in events:
                yield form % json.dumps(event)
    except (LmiError, HttpError) as error:
        failure = error if isinstance(error, HttpError) else HttpError.of(error)
        yield form % json.dumps({"error": failure.message, "code": failure.status})


def _tokens(chunk: Chunk) -> list[dict[str, Any]]:
    """A chunk's tokens; its text, which may be several tokens', stands with the last one."""
    scores = [entry.logprob for entry in chunk.logprobs or []]
    texts = [""] * (len(chunk.token_ids) - 1) + [chunk.text or ""]
    return [
        {"token": {"id": token, "text": text, "log_prob": score}}
        for token, text, score in zip(chunk.token_ids, texts, scores, strict=True)
    ]


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is no UTF-8 at byte {error.start}") from None


def _is_ids(inputs: Any) -> bool:
    return bool(inputs) and all(isinstance(entry, int) for entry in inputs)
