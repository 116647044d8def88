"""One engine process, and the two threads that pass messages between it and an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import psutil

from lmi_multi.serve import wire


@dataclass(frozen=True)
class End:
    """Why a process ended."""

    reason: str
    lacked_memory: bool = False


class EngineProcess:
    """A running `lmi_multi.serve.worker`, made inside the loop that its messages go to.

    `handle` is called in the loop with each message but `broken`; `ended` tells why the process
    is no more.
    """

    def __init__(
        self, load: wire.Message, handle: Callable[[wire.Message], None], log_format: str
    ) -> None:
        """`load` is the first message: what the process is to load."""
        self._loop = asyncio.get_running_loop()
        self._handle = handle
        self.ended: asyncio.Future[End] = self._loop.create_future()
        self._outbox: queue.SimpleQueue[wire.Message | None] = queue.SimpleQueue()
        self.send(load)
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "lmi_multi.serve.worker", str(theirs.fileno()), log_format]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that it can be ended together with its ranks
            )
        pipe = Connection(ours.detach())
        for target in (self._write, self._read):
            threading.Thread(target=target, args=(pipe,), daemon=True).start()

    def send(self, message: wire.Message) -> None:
        """Never waits. What a process that has ended is told is lost."""
        self._outbox.put(message)

    def memory(self) -> int:
        """Bytes that it and its ranks take; of what several processes share, their part."""
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            engine = psutil.Process(self._process.pid)
            for process in (engine, *engine.children(recursive=True)):
                total += process.memory_full_info().pss
        return total

    def kill(self) -> None:
        """End it and its ranks at once, and wait for that."""
        self._outbox.put(None)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # ranks hang as well as they die
        self._process.wait()

    def _write(self, pipe: Connection) -> None:
        """A thread: what is put in the outbox goes to the engine; None ends it."""
        while (message := self._outbox.get()) is not None:
            try:
                wire.send(pipe, message)
            except OSError:
                return  # the reader says why

    def _read(self, pipe: Connection) -> None:
        """A thread: every message goes to the loop, the end of them as well."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            try:
                while (message := wire.receive(pipe))["type"] != "broken":
                    self._loop.call_soon_threadsafe(self._handle, message)
                end = End(message["error"], message["memory"])
            except (EOFError, OSError):
                code = self._process.wait()
                end = End(_reason(code), code == -signal.SIGKILL)  # the kernel's way to say so
            pipe.close()
            self._loop.call_soon_threadsafe(self._settle, end)

    def _settle(self, end: End) -> None:
        if not self.ended.done():
            self.ended.set_result(end)


def _reason(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
