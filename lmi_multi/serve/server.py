"""Runs the application until it is told to stop, and then finishes what it has begun."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading

import uvicorn

from lmi_multi.serve.app import Application
from lmi_multi.serve.connections import bounded
from lmi_multi.serve.settings import ServeSettings

LAST_WORDS = 6.0  # seconds of the drain that are left from the cut to the end, in parts:
# to tell clients that they are cut, for what uvicorn then waits for, to end the engine and this
# process, which with a long backlog takes its time, and what is left if that takes too long

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn, ended by SIGTERM or SIGINT: no new connection, then the requests that run; what is
    left `LAST_WORDS` before the end of the drain gets an error, and connections on which that does
    not get through are reset. Where the process still lives a fourth of that before the end,
    nothing is owed to anybody any more, and it leaves as it is.

    At a second signal only `LAST_WORDS` are left; at a third nothing."""

    def __init__(self, application: Application, settings: ServeSettings) -> None:
        drain = settings.drain_timeout
        self._part = min(LAST_WORDS, drain / 2) / 4
        super().__init__(
            uvicorn.Config(
                application.app,
                host=settings.host,
                port=settings.port,
                http=bounded(settings.max_queue),
                ws="none",
                timeout_graceful_shutdown=drain - 2 * self._part,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )
        self._application, self._drain = application, drain
        self._told = 0  # how often to stop

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on `sockets` until a signal comes, or the engine cannot be had."""
        asyncio.run(self._run(sockets))

    async def _run(self, sockets: list[socket.socket] | None) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        watch = asyncio.create_task(self._watch())
        try:
            await self._serve(sockets)
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        """End the server once there will be no engine any more."""
        while self._application.error is None:
            await asyncio.sleep(0.1)
        self._end()

    def _stop(self) -> None:
        self._told += 1
        if self._told == 2:
            log.warning("told once more to stop: what runs is cut")
            self._end_within(4 * self._part)
        elif self._told > 2:
            _leave("it was told three times")
        self._end()

    def _end(self) -> None:
        self.should_exit = True
        if not self._application.draining:
            self._application.drain()
            self._end_within(self._drain)

    def _end_within(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(seconds - 4 * self._part, self._cut)
        # A thread, as it is for a loop or an interpreter that no longer gets on.
        late = threading.Timer(seconds - self._part, _leave)
        late.daemon = True
        late.start()

    def _cut(self) -> None:
        """Fail what is left. Clients have a part of the time to take that, also those of a loop
        that is late."""
        self._application.cut("the server is shutting down")
        asyncio.get_running_loop().call_later(self._part, self._reset)

    def _reset(self) -> None:
        """Give up clients that do not read what they are told."""
        left = [*self.server_state.connections]
        if left:
            log.warning("%d connections are reset, as their clients do not read", len(left))
        for connection in left:
            connection.transport.abort()


def _leave(why: str = "its time is up") -> None:
    log.warning("the server ends without putting its things in order: %s", why)
    os._exit(0)  # the engine ends by itself once nobody holds the other end of its pipe
