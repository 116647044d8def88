"""OpenAI's routes: completions, chat completions, embeddings, models."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from lmi_multi.errors import LmiError, OptionError
from lmi_multi.options import TokenLogprob
from lmi_multi.prompts import as_list
from lmi_multi.serve import body, described
from lmi_multi.serve.answer import Answer
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.openai_bodies import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
)
from lmi_multi.serve.service import Service, Wanted, first
from lmi_multi.streaming import Chunk
from lmi_multi.tokenizer import text_of

_SAME = (  # options that go by the same name on both sides
    *("temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "top_k", "min_p", "typical_p", "repetition_penalty", "min_new_tokens"),
    *("no_repeat_ngram_size", "bad_words", "stop_token_ids", "ignore_eos", "num_beams"),
    *("length_penalty", "early_stopping", "do_sample"),
)


# Those that do not: what a client calls ours.
_CALLED = {"max_new_tokens": "max_tokens", "num_return_sequences": "n", "return_full_text": "echo"}


def router(service: Service, max_body: int, name: str) -> APIRouter:
    """The routes of one model that is called `name`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    started = int(time.time())

    async def asked(request: Request) -> Any:
        value = body.parse(await body.read(request, max_body))
        given = value.get("model") if isinstance(value, dict) else None
        if given not in (None, "", name):
            raise _other_model(given, name)
        return value

    streams = (described.EVENTS,)

    @routes.post(
        "/completions",
        openapi_extra=described.request(CompletionRequest),
        responses=described.answers(described.COMPLETION, described.OPENAI_ERROR, streams),
    )
    async def completions(request: Request) -> Response:
        """Continue prompts."""
        return await completion(service, await asked(request), request, name)

    @routes.post(
        "/chat/completions",
        openapi_extra=described.request(ChatRequest),
        responses=described.answers(described.CHAT, described.OPENAI_ERROR, streams),
    )
    async def chat_completions(request: Request) -> Response:
        """Continue a conversation."""
        return await chat_completion(service, await asked(request), request, name)

    @routes.post(
        "/embeddings",
        openapi_extra=described.request(EmbeddingRequest),
        responses=described.answers(described.EMBEDDINGS, described.OPENAI_ERROR),
    )
    async def embeddings(request: Request) -> Response:
        """One vector a text."""
        return await _embed(service, await asked(request), request, name)

    entry = {"id": name, "object": "model", "created": started, "owned_by": "lmi_multi"}

    @routes.get("/models", responses=described.answers(described.MODELS, described.OPENAI_ERROR))
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [entry]}

    # A path: names of models have slashes.
    @routes.get(
        "/models/{model:path}", responses=described.answers(described.MODEL, described.OPENAI_ERROR)
    )
    async def one_model(model: str) -> dict[str, Any]:
        """The same, if that is its name."""
        if model != name:
            raise _other_model(model, name)
        return entry

    return routes


def _other_model(given: object, name: str) -> HttpError:
    return HttpError(404, f"model is {given!r:.80}; allowed: {name!r}", "model")


async def completion(service: Service, value: Any, request: Request, name: str = "") -> Response:
    """Answer a `CompletionRequest`."""
    asked = body.check(CompletionRequest, value)
    options = _options(asked, asked.max_tokens)
    if asked.logprobs is not None:
        options["logprobs"] = asked.logprobs
    if asked.echo:
        options["return_full_text"] = True
    with _in_their_words(_CALLED):
        wanted = await service.wanted(as_list(asked.prompt), options)
    shape = _Text(service, name or asked.model, wanted)
    return await _respond(service, asked, wanted, shape, request)


async def chat_completion(
    service: Service, value: Any, request: Request, name: str = ""
) -> Response:
    """Answer a `ChatRequest`."""
    asked = body.check(ChatRequest, value)
    length = asked.max_completion_tokens
    options = _options(asked, length if length is not None else asked.max_tokens)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise HttpError(
            400, "top_logprobs is set, yet logprobs is false; allowed: logprobs=true", "logprobs"
        )
    if asked.logprobs:
        options["logprobs"] = asked.top_logprobs or 0
    called = _CALLED | {"logprobs": "top_logprobs"}
    if asked.max_completion_tokens is not None:
        called["max_new_tokens"] = "max_completion_tokens"
    with _in_their_words(called):
        wanted = await service.conversation(asked.messages, options)
    shape = _Chat(service, name or asked.model, wanted)
    return await _respond(service, asked, wanted, shape, request)


def _options(asked: Generation, length: int | None) -> dict[str, Any]:
    """Our options. OpenAI samples at temperature 1 unless told otherwise."""
    given = {n: getattr(asked, n) for n in _SAME if getattr(asked, n) is not None}
    if length is not None:
        given["max_new_tokens"] = length
    if asked.stream_options is not None and not asked.stream:
        message = "stream_options is set, yet stream is false; allowed: with stream=true"
        raise HttpError(400, message, "stream_options")
    if asked.n is not None and asked.n != 1:
        given["num_return_sequences"] = asked.n
    if "do_sample" not in given:
        given["do_sample"] = given.get("num_beams", 1) == 1 and given.get("temperature") != 0
    if not given["do_sample"] and given.get("temperature") == 0:
        del given["temperature"]
        given.pop("top_p", None)  # it means nothing there, and clients send it along
    elif given["do_sample"]:
        given = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | given
    return given


@contextlib.contextmanager
def _in_their_words(called: Mapping[str, str]) -> Iterator[None]:
    """Names our options in errors as the client does."""
    try:
        yield
    except OptionError as error:
        message = re.sub(r"\w+", lambda word: called.get(word[0], word[0]), str(error))
        param = error.option and called.get(error.option, error.option)
        raise HttpError(400, message, param) from None


class _Text:
    """The shape of completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, service: Service, name: str, wanted: Sequence[Wanted]) -> None:
        self.service, self.wanted = service, wanted
        self.id = self.prefix + uuid.uuid4().hex
        self.name, self.created = name, int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and every chunk begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        return {"index": index, "text": answer.text, "logprobs": self.logprobs(answer.logprobs)}

    def delta(self, chunk: Chunk, begins: bool) -> dict[str, Any]:
        """What a chunk adds; `begins` for an answer's first one."""
        text = chunk.text or ""
        if begins:
            text = self.wanted[chunk.index].text + text
        return {"text": text, "logprobs": self.logprobs(chunk.logprobs)}

    def logprobs(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """Log-probabilities of tokens."""
        if not entries:
            return None
        return {
            "tokens": [self.token(e.token_id) for e in entries],
            "token_logprobs": [e.logprob for e in entries],
            "top_logprobs": [{self.token(t): p for t, p in e.top.items()} for e in entries],
        }

    def token(self, token_id: int) -> str:
        """A token as text; its id where there is no tokenizer."""
        tokenizer = self.service.tokenizer
        if tokenizer is None:
            return f"token_id:{token_id}"
        return text_of(tokenizer, [token_id], False)


class _Chat(_Text):
    """The shape of chat completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """See `_Text.choice`."""
        message = {"role": "assistant", "content": answer.text}
        return {"index": index, "message": message, "logprobs": self.logprobs(answer.logprobs)}

    def delta(self, chunk: Chunk, begins: bool) -> dict[str, Any]:
        """See `_Text.delta`."""
        delta = {"role": "assistant"} if begins else {}
        if chunk.text:
            delta["content"] = chunk.text
        return {"delta": delta, "logprobs": self.logprobs(chunk.logprobs)}

    def logprobs(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """See `_Text.logprobs`."""
        if not entries:
            return None
        return {
            "content": [
                self._entry(e.token_id, e.logprob)
                | {"top_logprobs": [self._entry(t, p) for t, p in e.top.items()]}
                for e in entries
            ]
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.token(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


async def _respond(
    service: Service,
    asked: Generation,
    wanted: Sequence[Wanted],
    shape: _Text,
    request: Request,
) -> Response:
    if asked.stream:
        chunks = await first(service.stream(wanted), request)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(_events(chunks, shape, usage), media_type="text/event-stream")
    found = [a for answers in await service.answers(wanted, request) for a in answers]
    choices = [
        shape.choice(index, answer) | {"finish_reason": _reason(answer.finish_reason)}
        for index, answer in enumerate(found)
    ]
    usage_ = _usage(wanted, sum(len(answer.token_ids) for answer in found))
    return JSONResponse(shape.head(shape.kind) | {"choices": choices, "usage": usage_})


async def _events(
    found: AsyncGenerator[list[Chunk]], shape: _Text, with_usage: bool
) -> AsyncIterator[str]:
    begun: set[int] = set()
    tokens = 0
    starts = [sum(own.answers for own in shape.wanted[:i]) for i in range(len(shape.wanted))]
    head = shape.head(shape.chunk_kind)
    try:
        async for chunks in found:
            for chunk in chunks:
                if chunk.error is not None:
                    raise HttpError(500, f"{chunk.finish_reason}: {chunk.error}")
                index = starts[chunk.index] + chunk.answer
                tokens += len(chunk.token_ids)
                reason = None if chunk.finish_reason is None else _reason(chunk.finish_reason)
                choice = shape.delta(chunk, index not in begun)
                begun.add(index)
                choices = [{"index": index, **choice, "finish_reason": reason}]
                yield f"data: {json.dumps(head | {'choices': choices})}\n\n"
    except (LmiError, HttpError) as error:
        failure = error if isinstance(error, HttpError) else HttpError.of(error)
        yield f"data: {json.dumps(failure.openai())}\n\n"
        return
    if with_usage:
        usage = {"choices": [], "usage": _usage(shape.wanted, tokens)}
        yield f"data: {json.dumps(head | usage)}\n\n"
    yield "data: [DONE]\n\n"


async def _embed(service: Service, value: Any, request: Request, name: str) -> Response:
    asked = body.check(EmbeddingRequest, value)
    vectors, tokens = await service.embed(
        as_list(asked.input), request, asked.pooling, asked.normalize
    )
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector, asked.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


def _encoded(vector: list[float], form: str) -> list[float] | str:
    if form == "float":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def _reason(reason: str) -> str:
    return "stop" if reason in ("eos", "stop") else reason


def _usage(wanted: Sequence[Wanted], generated: int) -> dict[str, int]:
    prompt = sum(len(own.ids) for own in wanted)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
