"""The server's side of the engine process: starts it, watches it, and passes answers on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmi_multi.backends.base import Limits
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.errors import LmiError
from lmi_multi.models.traits import Traits
from lmi_multi.options import GenerateOptions
from lmi_multi.prompts import PromptReader
from lmi_multi.serve import wire
from lmi_multi.serve.failures import (
    EngineGoneError,
    NotReadyError,
    OverloadedError,
    RefusedError,
    UnreadError,
)
from lmi_multi.serve.inbox import MAX_SCRIPT_UNREAD, MAX_UNREAD, Inbox, size_of
from lmi_multi.serve.process import End, EngineProcess
from lmi_multi.streaming import Chunk
from lmi_multi.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

MAX_STARTS = 3  # engines in a row that end before they have answered anything
BYTES_A_TOKEN = 4  # to know before tokenizing whether there is room
PATIENCE = 2.0  # seconds to wait before an engine is started once more, doubled each time
LOOK = 0.25  # seconds between two looks at whether the engine speaks


class Watch(Protocol):
    """Who wants to know how a prompt fares."""

    def started(self, at: int) -> None:
        """It left the queue; `at` in nanoseconds since 1970."""

    def first(self) -> None:
        """It has its first token."""


@dataclass(frozen=True)
class Ask:
    """One prompt for the engine, checked, and how many answers it has."""

    ids: list[int]
    options: GenerateOptions
    answers: int
    watch: Watch


@dataclass(frozen=True)
class _Asked:
    """What the engine owes an answer: where that goes, which prompt of its request it is, and
    about how many tokens it has."""

    inbox: Inbox
    tokens: int
    index: int = 0
    watch: Watch | None = None


class EngineClient:
    """One engine process at a time, and what is asked of it. Lives in one asyncio loop.

    A process that ends, or that says nothing for `step_timeout` seconds while it is asked
    something, fails what it was answering and is replaced. `error` says why there is none and will
    be none, `failed` that it is its own fault, and `lacked_memory` that the last one ended for want
    of memory; `state` is what it last said of itself.
    """

    def __init__(
        self,
        load: Mapping[str, Any],
        *,
        max_requests: int = 1024,
        max_tokens: int = 1 << 20,
        startup_timeout: float = 3600.0,
        step_timeout: float = 30.0,
        log_format: str = "text",
    ) -> None:
        self._load = dict(load)
        self.max_requests, self._max_tokens = max_requests, max_tokens
        self._startup_timeout, self._step_timeout = startup_timeout, step_timeout
        self._log_format = log_format
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._held_requests = self._held_tokens = 0
        self._process: EngineProcess | None = None
        self._silent = 0.0  # seconds since it was heard of
        self._heard = 0.0  # when that was
        self._answered = False  # the current process, anything
        self._supervisor: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        self.error: str | None = None
        self.failed = False
        self.lacked_memory = False
        self.reader: PromptReader | None = None
        self.info: wire.Message = {}
        self.state: dict[str, int] = {"rows": 0, "waiting": 0, "blocks": 0, "steps": 0}
        self.restarts = 0

    async def start(self) -> None:
        """Start the engine, and keep one running, until `close`."""
        self._supervisor = asyncio.create_task(self._supervise())

    async def started(self) -> None:
        """Wait until it can answer, or has an `error`."""
        ready = asyncio.create_task(self.ready.wait())
        try:
            await asyncio.wait(
                [ready, *filter(None, [self._supervisor])], return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()

    async def close(self, reason: str = "the server is shutting down") -> None:
        """End the engine. What it was answering fails with `reason`."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self.ready.clear()
        self.error = self.error or reason
        self._fail_all(EngineGoneError(self.error))

    def memory(self) -> int:
        """Bytes of memory that its processes take; 0 if there are none."""
        return 0 if self._process is None else self._process.memory()

    @property
    def _busy(self) -> bool:
        """Whether it should be heard of: it owes an answer, or does what nobody wants any more."""
        return bool(self._asked or self.state["rows"])

    @property
    def requests(self) -> int:
        """How many requests are being answered, or wait to be."""
        return len(self._asked)

    def check_room(self, requests: int = 1, tokens: int = 0) -> None:
        """Raise OverloadedError unless so many requests of about so many tokens in all may come
        in, NotReadyError while the engine starts, and EngineGoneError where there is none and will
        be none."""
        if self.error is not None:
            raise EngineGoneError(self.error)
        if not self.ready.is_set():
            raise NotReadyError("the engine is being started")
        present = len(self._asked) + self._held_requests
        if present + requests > self.max_requests:
            raise OverloadedError(f"{present} requests are being answered; try again later")
        waiting = sum(asked.tokens for asked in self._asked.values()) + self._held_tokens
        if present and waiting + tokens > self._max_tokens:
            raise OverloadedError("too many tokens are waiting; try again later")

    @contextlib.contextmanager
    def hold(self, requests: int, tokens: int) -> Iterator[None]:
        """Keep room for requests that are being tokenized. Raises what `check_room` raises."""
        self.check_room(requests, tokens)
        self._held_requests += requests
        self._held_tokens += tokens
        try:
            yield
        finally:
            self._held_requests -= requests
            self._held_tokens -= tokens

    async def generate(
        self, prompts: Sequence[Ask], timeout: float, stream: bool = True
    ) -> AsyncGenerator[list[Chunk]]:
        """Chunks of the answers to all prompts, those that one step brought at a time, until each
        answer has its last one; a prompt's place is in `Chunk.index`. Without `stream` an answer
        is one chunk. A chunk has text only where stop strings had to be looked for.

        Raises EngineGoneError, RefusedError, LateError after `timeout` seconds, or UnreadError
        where a stream is taken so slowly that its `Inbox` is full: the prompts' places are free
        by then. Closing the iterator frees them at the next step.
        """
        inbox = Inbox(MAX_UNREAD if stream else None)
        numbers: list[int] = []
        left = sum(own.answers for own in prompts)
        with inbox.within(timeout):
            try:
                for index, own in enumerate(prompts):
                    message = {"type": "submit", "ids": own.ids, "stream": stream}
                    asked = _Asked(inbox, len(own.ids), index, own.watch)
                    numbers.append(self._ask(message | {"options": own.options.given()}, asked))
                while left:
                    chunks: list[Chunk] = await inbox.next()
                    left -= sum(chunk.finish_reason is not None for chunk in chunks)
                    yield chunks
            finally:
                for number in numbers:
                    self._forget(number)

    async def embed(
        self, ids: list[list[int]], pooling: str, normalize: bool, timeout: float
    ) -> list[list[float]]:
        """One vector a text. Raises EngineGoneError, RefusedError, or LateError after `timeout`
        seconds; cancelled, it ends at the next step's worth of texts."""
        message = {"type": "embed", "ids": ids, "pooling": pooling, "normalize": normalize}
        inbox = Inbox()
        number = self._ask(message, _Asked(inbox, sum(map(len, ids))))
        try:
            with inbox.within(timeout):
                vectors: list[list[float]] = await inbox.next()
            return vectors
        finally:
            self._forget(number)

    async def invoke(
        self, content: bytes, properties: Mapping[str, str], timeout: float
    ) -> AsyncGenerator[wire.Message]:
        """What a script answers: its messages up to the one that is the `last`.

        Raises EngineGoneError, LateError after `timeout` seconds, or UnreadError as `generate`
        does. Closing the iterator ends a stream at its next part, and keeps a call that has not
        begun from doing so.
        """
        message = {"type": "invoke", "content": wire.text(content), "properties": dict(properties)}
        inbox = Inbox(MAX_SCRIPT_UNREAD)
        number = self._ask(message, _Asked(inbox, len(content) // BYTES_A_TOKEN))
        with inbox.within(timeout):
            try:
                last = False
                while not last:
                    part: wire.Message = await inbox.next()
                    last = part["last"]
                    yield part
            finally:
                self._forget(number)

    def cut(self, reason: str) -> None:
        """Fail everything that is being answered, as the server has no more time for it."""
        for number in self._asked:
            self._send({"type": "cancel", "id": number})
        self._fail_all(EngineGoneError(reason))

    def _ask(self, message: wire.Message, asked: _Asked) -> int:
        self.check_room(1, asked.tokens)
        number = next(self._numbers)
        if not self._busy:
            self._note_sign()  # it had nothing to do
        self._asked[number] = asked
        self._send(message | {"id": number})
        return number

    def _forget(self, number: int) -> None:
        if self._asked.pop(number, None) is not None:  # else it has its whole answer
            self._send({"type": "cancel", "id": number})

    def _send(self, message: wire.Message) -> None:
        if self._process is not None:
            self._process.send(message)

    def _fail_all(self, error: LmiError) -> None:
        for asked in self._asked.values():
            asked.inbox.put(error)

    # --- the process

    async def _supervise(self) -> None:
        """Keep an engine running; give up when several in a row do nothing."""
        failures = 0
        while True:
            self._answered = False
            end = await self._live()
            reason, self.lacked_memory = end.reason, end.lacked_memory
            self.ready.clear()
            self._fail_all(EngineGoneError(reason))
            failures = 0 if self._answered else failures + 1
            log.error("the engine ended: %s", reason)
            if failures >= MAX_STARTS or (failures and self.restarts == 0 and not self.info):
                self.error, self.failed = reason, True
                return
            self.restarts += 1
            await asyncio.sleep(PATIENCE * 2.0 ** max(failures - 1, 0))

    async def _live(self) -> End:
        """Start a process and see it through to its end. Time counts only while this one looks on:
        when it was itself stopped, what the engine said meanwhile is still to be read."""
        self._process = process = EngineProcess(self._load, self._handle, self._log_format)
        waited = 0.0
        try:
            while not process.ended.done():
                began = time.monotonic()
                await asyncio.wait([process.ended], timeout=LOOK)
                now = time.monotonic()
                passed = min(now - began, 2 * LOOK)
                waited += passed
                self._silent += min(passed, now - self._heard)
                if not self.ready.is_set() and waited > self._startup_timeout:
                    return End(f"it was not ready within {self._startup_timeout:g} s")
                if self._busy and self.ready.is_set() and self._silent > self._step_timeout:
                    return End(f"it said nothing for {self._step_timeout:g} s")
            return process.ended.result()
        finally:
            process.kill()
            self._process = None
            self.state = dict.fromkeys(self.state, 0)

    def _note_sign(self) -> None:
        self._silent, self._heard = 0.0, time.monotonic()

    def _handle(self, message: wire.Message) -> None:
        self._note_sign()
        kind = message["type"]
        if kind == "ready":
            self._prepare(message)
        elif kind == "step":
            self._note_state(message)
            self._note_step(message)
        elif kind == "state":
            self._note_state(message)
        elif kind == "embedded":
            self._answered = True
            self._finish(message["id"], message["vectors"])
        elif kind == "output":
            self._answered = True
            pass_on = self._finish if message["last"] else self._pass_on
            pass_on(message["id"], message, len(message.get("content", "")))
        elif kind == "refused":
            self._finish(message["id"], RefusedError(message["error"]))

    def _note_state(self, message: wire.Message) -> None:
        self._answered = True
        self.state = {name: message[name] for name in self.state}

    def _note_step(self, message: wire.Message) -> None:
        """Pass on what a step brought: one list of chunks for each request."""
        for number in message["started"]:
            if (watch := self._watch(number)) is not None:
                watch.started(message["began"])
        for number in message["first"]:
            if (watch := self._watch(number)) is not None:
                watch.first()
        chunks: dict[Inbox, list[Chunk]] = {}
        for number, chunk in message["chunks"]:
            if (asked := self._asked.get(number)) is not None:  # else its caller has gone
                chunks.setdefault(asked.inbox, []).append(wire.unpack(chunk, asked.index))
        for inbox, own in chunks.items():
            inbox.put(own, size_of(own))
        for number in message["ended"]:
            self._asked.pop(number, None)
        for inbox in chunks:
            self._cut_if_unread(inbox)

    def _cut_if_unread(self, inbox: Inbox) -> None:
        """End a request whose client does not take what comes. Its error waits to be read."""
        numbers = [number for number, asked in self._asked.items() if asked.inbox is inbox]
        if not numbers or not inbox.is_full:
            return
        for number in numbers:
            self._forget(number)
        log.warning(
            "a request is cut at step %d: its client leaves more than %d bytes unread",
            self.state["steps"],
            inbox.limit,
        )
        inbox.fail(UnreadError("the client reads more slowly than the server may wait for"))

    def _watch(self, number: int) -> Watch | None:
        asked = self._asked.get(number)
        return None if asked is None else asked.watch

    def _pass_on(self, number: int, answer: Any, size: int = 0) -> None:
        if number in self._asked:  # else its caller has gone
            inbox = self._asked[number].inbox
            inbox.put(answer, size)
            self._cut_if_unread(inbox)

    def _finish(self, number: int, answer: Any, size: int = 0) -> None:
        """Pass on the last that comes for it."""
        if (asked := self._asked.pop(number, None)) is not None:
            asked.inbox.put(answer, size)

    def _prepare(self, message: wire.Message) -> None:
        if "folder" in message:  # a script keeps to itself what it reads
            folder = Path(message["folder"])
            self.reader = PromptReader(
                Traits(**message["traits"]),
                Limits(**message["limits"]),
                load_tokenizer(folder),
                GenerationDefaults.read(folder),
            )
        self.info = message
        self.ready.set()
