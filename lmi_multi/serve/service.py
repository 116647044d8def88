"""One model as the routes see it: prompts and options in, chunks or whole answers out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from lmi_multi import chat
from lmi_multi.errors import LmiError, OptionError
from lmi_multi.options import GenerateOptions
from lmi_multi.prompts import Prompt, PromptReader
from lmi_multi.serve.answer import Answer, GrowingTexts
from lmi_multi.serve.client import BYTES_A_TOKEN, Ask, EngineClient
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.failures import EngineGoneError
from lmi_multi.serve.metrics import Metrics
from lmi_multi.streaming import Chunk
from lmi_multi.tokenizer import Tokenizer, text_of


@dataclass(frozen=True)
class Wanted:
    """One prompt of a request, checked: its token ids, its options, and how many answers it has.

    `text` is what stands before each answer: the prompt, where the options ask for it."""

    ids: list[int]
    options: GenerateOptions
    answers: int
    text: str = ""


class Service:
    """Everything that may be asked of the model."""

    def __init__(self, engine: EngineClient, metrics: Metrics, timeout: float) -> None:
        self.engine = engine
        self.metrics = metrics
        self._timeout = timeout

    @property
    def reader(self) -> PromptReader:
        """What checks prompts. Raises what `EngineClient.check_room` raises."""
        self.engine.check_room(0)
        if self.engine.reader is None:
            raise EngineGoneError("there has never been one")
        return self.engine.reader

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one; also once its engine is gone, as what that has
        answered by then is still to be put into words."""
        return None if self.engine.reader is None else self.engine.reader.tokenizer

    @property
    def is_encoder(self) -> bool:
        """Whether the model generates nothing."""
        return self.reader.spec.kind == "encoder"

    async def wanted(
        self, prompts: Sequence[Prompt], options: Mapping[str, Any], length: int | None = None
    ) -> list[Wanted]:
        """The prompts of a request, tokenized and checked in a thread.

        `length` is the number of new tokens where neither the options nor the model's own file
        set one. Raises OptionError, and OverloadedError before anything is tokenized.
        """
        with self._room(prompts):
            return await asyncio.to_thread(self._wanted, prompts, options, length)

    def check_prompts(self, count: int) -> None:
        """Raise OptionError for more prompts in a request than may ever wait, or none."""
        most = self.engine.max_requests
        if not 1 <= count <= most:
            raise OptionError(f"{count} prompts are given; allowed: 1 to {most}")

    def _room(self, prompts: Sequence[Prompt]) -> contextlib.AbstractContextManager[None]:
        """Room for these prompts while they are tokenized."""
        self.check_prompts(len(prompts))
        size = sum(map(len, prompts)) // BYTES_A_TOKEN
        return self.engine.hold(len(prompts), size)

    def _wanted(
        self, prompts: Sequence[Prompt], options: Mapping[str, Any], length: int | None
    ) -> list[Wanted]:
        reader = self.reader
        if reader.spec.kind == "encoder":
            raise OptionError(f"{reader.spec.family} is an encoder and generates no text")
        given = GenerateOptions.of(options)
        if given.prompt_logprobs:
            raise OptionError("prompt_logprobs is True; allowed: False, as nothing here returns it")
        results = []
        for index, prompt in enumerate(prompts):
            ids = reader.ids(prompt, index)
            own = given if length is None else reader.bounded(given, ids, length)
            job = reader.job(index, ids, own)
            text = ""
            if job.answers[0].options.return_full_text:
                text = prompt if isinstance(prompt, str) else self._text(ids)
            results.append(Wanted(ids, own, len(job.answers), text))
        return results

    def _text(self, ids: list[int]) -> str:
        return "" if self.tokenizer is None else text_of(self.tokenizer, ids)

    async def conversation(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> list[Wanted]:
        """The same as `wanted` for one conversation."""
        with self._room([json.dumps(messages)]):
            ids = await asyncio.to_thread(chat.render, self.tokenizer, messages)
            return await asyncio.to_thread(self._wanted, [ids], options, None)

    async def stream(
        self, wanted: Sequence[Wanted], whole: bool = False
    ) -> AsyncGenerator[list[Chunk]]:
        """Chunks of all prompts' answers, those at a time that came together; a prompt's place is
        in `Chunk.index`. `whole`: an answer is one chunk.

        Raises EngineGoneError, RefusedError or LateError. Closing it frees the prompts' places.
        """
        watches = [self.metrics.request(len(own.ids), own.answers) for own in wanted]
        asks = [
            Ask(own.ids, own.options, own.answers, watch)
            for own, watch in zip(wanted, watches, strict=True)
        ]
        texts = GrowingTexts(self.tokenizer)
        found = self.engine.generate(asks, self._timeout, stream=not whole)
        try:
            async with contextlib.aclosing(found):
                async for chunks in found:
                    for chunk in chunks:
                        watches[chunk.index].chunk(chunk)
                    yield [texts.with_text(chunk) for chunk in chunks]
        except LmiError as error:
            for watch in watches:
                watch.failed(error)
            raise
        except BaseException:
            for watch in watches:
                watch.aborted()
            raise

    async def answers(self, wanted: Sequence[Wanted], request: Request) -> list[list[Answer]]:
        """Every answer to every prompt, whole. When the client goes away, their places are freed
        and HttpError 499 is raised."""
        found = [[Answer(own.text) for _ in range(own.answers)] for own in wanted]

        async def collect() -> None:
            stream = self.stream(wanted, whole=True)
            async with contextlib.aclosing(stream):
                async for chunks in stream:
                    for chunk in chunks:
                        found[chunk.index][chunk.answer].add(chunk)

        await while_connected(request, collect())
        return found

    async def embed(
        self,
        prompts: Sequence[Prompt],
        request: Request,
        pooling: str = "mean",
        normalize: bool = True,
    ) -> tuple[list[list[float]], int]:
        """One vector a text, and how many tokens there were."""
        reader = self.reader
        with self._room(prompts):
            ids = await asyncio.to_thread(
                lambda: [reader.ids(prompt, index) for index, prompt in enumerate(prompts)]
            )
        watches = [self.metrics.request(len(own)) for own in ids]
        try:
            work = self.engine.embed(ids, pooling, normalize, self._timeout)
            vectors = await while_connected(request, work)
        except LmiError as error:
            for watch in watches:
                watch.failed(error)
            raise
        except BaseException:
            for watch in watches:
                watch.aborted()
            raise
        for watch in watches:
            watch.done()
        return vectors, sum(map(len, ids))


async def while_connected(request: Request, work: Any) -> Any:
    """What `work`, a coroutine, returns; it is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HttpError(499, "the client has gone")
        return task.result()
    finally:
        for own in (task, gone):
            own.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


async def first(
    chunks: AsyncGenerator[list[Chunk]], request: Request
) -> AsyncGenerator[list[Chunk]]:
    """The same chunks, with the first ones already there: what is wrong at once is raised now.

    A client that goes away before that frees its prompts' places, and HttpError 499 is raised.
    """
    head = await while_connected(request, anext(chunks, None))

    async def rest() -> AsyncGenerator[list[Chunk]]:
        async with contextlib.aclosing(chunks):
            if head is not None:
                yield head
                async for more in chunks:
                    yield more

    return rest()
