"""The server's side of the engine process: starts it, watches it, and passes answers on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lmi_multi.backends.base import Limits
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.errors import LmiError
from lmi_multi.models.traits import Traits
from lmi_multi.options import GenerateOptions
from lmi_multi.prompts import PromptReader
from lmi_multi.serve import wire
from lmi_multi.streaming import Chunk
from lmi_multi.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

MAX_STARTS = 3  # engines in a row that end before they have answered anything
BYTES_A_TOKEN = 4  # to know before tokenizing whether there is room
PATIENCE = 2.0  # seconds to wait before an engine is started once more, doubled each time


class EngineGoneError(LmiError):
    """The engine process ended, or hung, while it was answering."""


class RefusedError(LmiError):
    """The engine found something wrong with a request that the server had let through."""


class OverloadedError(LmiError):
    """There is no room for another request now; try again in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LateError(LmiError):
    """There was no whole answer in time."""


_Answer = Any  # a Chunk, a list of vectors, a message of a script, or an exception to raise


@dataclass(frozen=True)
class _End:
    """Why a process ended."""

    reason: str
    lacked_memory: bool = False


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
    ) -> None:
        self._load = dict(load)
        self.max_requests, self._max_tokens = max_requests, max_tokens
        self._startup_timeout, self._step_timeout = startup_timeout, step_timeout
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Queue[_Answer]] = {}
        self._tokens: dict[int, int] = {}
        self._started: dict[int, Callable[[int], None]] = {}
        self._held_requests = self._held_tokens = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._outbox: queue.SimpleQueue[wire.Message | None] = queue.SimpleQueue()
        self._heard = 0.0
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

    async def close(self) -> None:
        """End the engine. What it was answering fails."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self.ready.clear()
        self.error = self.error or "the server is shutting down"
        self._end_process()
        self._fail_all(EngineGoneError(self.error))

    @property
    def _busy(self) -> bool:
        """Whether it should be heard of: it owes an answer, or does what nobody wants any more."""
        return bool(self._answers or self.state["rows"])

    @property
    def requests(self) -> int:
        """How many requests are being answered, or wait to be."""
        return len(self._answers)

    def check_room(self, requests: int = 1, tokens: int = 0) -> None:
        """Raise OverloadedError unless so many requests of about so many tokens in all may come
        in, and EngineGoneError where there is no engine and will be none."""
        if self.error is not None:
            raise EngineGoneError(self.error)
        if not self.ready.is_set():
            raise OverloadedError("the engine is being started", 5)
        present = len(self._answers) + self._held_requests
        if present + requests > self.max_requests:
            raise OverloadedError(f"{present} requests are being answered; try again later")
        waiting = sum(self._tokens.values()) + self._held_tokens
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
        self,
        ids: list[int],
        options: GenerateOptions,
        answers: int = 1,
        started: Callable[[int], None] = lambda began: None,
    ) -> AsyncGenerator[Chunk]:
        """Chunks of the `answers` to one prompt, until each has its last one. `started` is called
        with the time (nanoseconds since 1970) at which the prompt left the queue.

        Raises EngineGoneError, or RefusedError. Closing the iterator frees the prompt's places at
        the next step.
        """
        message = {"type": "submit", "ids": ids, "options": options.given()}
        number, inbox = self._ask(message, len(ids))
        self._started[number] = started
        try:
            while answers:
                chunk: Chunk = await self._next(inbox)
                answers -= chunk.finish_reason is not None
                yield chunk
            del self._answers[number]  # nothing is left to cancel
        finally:
            self._forget(number)

    async def embed(self, ids: list[list[int]], pooling: str, normalize: bool) -> list[list[float]]:
        """One vector a text. Raises EngineGoneError, or RefusedError."""
        message = {"type": "embed", "ids": ids, "pooling": pooling, "normalize": normalize}
        number, answers = self._ask(message, sum(map(len, ids)))
        try:
            vectors: list[list[float]] = await self._next(answers)
            del self._answers[number]
            return vectors
        finally:
            self._forget(number)

    async def invoke(
        self, content: bytes, properties: Mapping[str, str], timeout: float
    ) -> AsyncGenerator[wire.Message]:
        """What a script answers: its messages up to the one that is the `last`.

        Raises EngineGoneError, or LateError after `timeout` seconds. Closing the iterator ends a
        stream at its next part, and keeps a call that has not begun from doing so.
        """
        message = {"type": "invoke", "content": wire.text(content), "properties": dict(properties)}
        number, answers = self._ask(message, len(content) // BYTES_A_TOKEN)
        late = LateError(f"no whole answer within {timeout:g} s")
        timer = asyncio.get_running_loop().call_later(timeout, answers.put_nowait, late)
        try:
            last = False
            while not last:
                part: wire.Message = await self._next(answers)
                last = part["last"]
                yield part
            del self._answers[number]
        finally:
            timer.cancel()
            self._forget(number)

    def cut(self, reason: str) -> None:
        """Fail everything that is being answered, as the server has no more time for it."""
        for number in [*self._answers]:
            self._outbox.put({"type": "cancel", "id": number})
        self._fail_all(EngineGoneError(reason))

    def _ask(self, message: wire.Message, tokens: int) -> tuple[int, asyncio.Queue[_Answer]]:
        self.check_room(1, tokens)
        number = next(self._numbers)
        answers: asyncio.Queue[_Answer] = asyncio.Queue()
        if not self._busy:
            self._heard = time.monotonic()  # it was silent because it had nothing to do
        self._answers[number], self._tokens[number] = answers, tokens
        self._outbox.put(message | {"id": number})
        return number, answers

    async def _next(self, answers: asyncio.Queue[_Answer]) -> Any:
        answer = await answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _forget(self, number: int) -> None:
        self._started.pop(number, None)
        self._tokens.pop(number, None)
        if self._answers.pop(number, None) is not None:
            self._outbox.put({"type": "cancel", "id": number})

    def _fail_all(self, error: LmiError) -> None:
        for answers in self._answers.values():
            answers.put_nowait(error)

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

    async def _live(self) -> _End:
        """Start a process and see it through to its end."""
        ended: asyncio.Future[_End] = asyncio.get_running_loop().create_future()
        self._start_process(ended)
        deadline = time.monotonic() + self._startup_timeout
        try:
            while not ended.done():
                await asyncio.wait([ended], timeout=0.25)
                now = time.monotonic()
                if not self.ready.is_set() and now > deadline:
                    return _End(f"it was not ready within {self._startup_timeout:g} s")
                if self._busy and self.ready.is_set() and now - self._heard > self._step_timeout:
                    return _End(f"it said nothing for {self._step_timeout:g} s")
            return ended.result()
        finally:
            self._end_process()
            self.state = dict.fromkeys(self.state, 0)

    def _start_process(self, ended: asyncio.Future[_End]) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "lmi_multi.serve.worker", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that it can be ended together with its ranks
            )
        pipe = Connection(ours.detach())
        outbox: queue.SimpleQueue[wire.Message | None] = queue.SimpleQueue()
        self._outbox = outbox
        self.state = dict.fromkeys(self.state, 0)
        outbox.put(self._load)
        loop = asyncio.get_running_loop()
        for target, arguments in (
            (_write, (pipe, outbox)),
            (self._read, (pipe, self._process, loop, ended)),
        ):
            threading.Thread(target=target, args=arguments, daemon=True).start()

    def _end_process(self) -> None:
        self._outbox.put(None)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # ranks hang as well as they die
            self._process.wait()
        self._process = None

    def _read(
        self,
        pipe: Connection,
        process: subprocess.Popen[bytes],
        loop: asyncio.AbstractEventLoop,
        ended: asyncio.Future[_End],
    ) -> None:
        """A thread: every message goes to the loop, the end of them as well."""
        reason, lacked_memory = None, False
        try:
            while True:
                message = wire.receive(pipe)
                if message["type"] == "broken":
                    reason = message["error"]
                    lacked_memory = message["memory"]
                else:
                    loop.call_soon_threadsafe(self._handle, message)
        except (EOFError, OSError):
            pipe.close()
            code = process.wait()
            lacked_memory |= code == -signal.SIGKILL  # the kernel's way to say so
            end = _End(reason or _reason(code), lacked_memory)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(_settle, ended, end)

    def _handle(self, message: wire.Message) -> None:
        self._heard = time.monotonic()
        kind = message["type"]
        if kind == "ready":
            self._prepare(message)
        elif kind == "step":
            self._note_state(message)
            for number in message["started"]:
                if number in self._started:  # else its caller has gone
                    self._started.pop(number)(message["began"])
            for number, chunk in message["chunks"]:
                self._pass_on(number, wire.unpack(chunk))
        elif kind == "state":
            self._note_state(message)
        elif kind == "embedded":
            self._answered = True
            self._pass_on(message["id"], message["vectors"])
        elif kind == "output":
            self._answered = True
            self._pass_on(message["id"], message)
        elif kind == "refused":
            self._pass_on(message["id"], RefusedError(message["error"]))

    def _note_state(self, message: wire.Message) -> None:
        self._answered = True
        self.state = {name: message[name] for name in self.state}

    def _pass_on(self, number: int, answer: _Answer) -> None:
        if number in self._answers:  # else its caller has gone
            self._answers[number].put_nowait(answer)

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


def _write(pipe: Connection, outbox: queue.SimpleQueue[wire.Message | None]) -> None:
    """A thread: what is put in the outbox goes to the engine; None ends it."""
    while (message := outbox.get()) is not None:
        try:
            wire.send(pipe, message)
        except OSError:
            return  # the reader says why


def _settle(ended: asyncio.Future[_End], end: _End) -> None:
    if not ended.done():
        ended.set_result(end)


def _reason(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
