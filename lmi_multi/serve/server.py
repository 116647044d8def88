"""Runs the application until it is told to stop, and then finishes what it has begun."""

from __future__ import annotations

import asyncio
import signal
import socket

import uvicorn

from lmi_multi.serve.app import Application
from lmi_multi.serve.connections import bounded
from lmi_multi.serve.settings import ServeSettings

LAST_WORDS = 2.0  # seconds of the drain that are left to tell clients that they are cut


class Server(uvicorn.Server):
    """uvicorn, ended by SIGTERM or SIGINT: no new connection, then up to `drain` seconds for the
    requests that run; what is left then gets an error. A second signal ends it at once."""

    def __init__(self, application: Application, settings: ServeSettings) -> None:
        super().__init__(
            uvicorn.Config(
                application.app,
                host=settings.host,
                port=settings.port,
                http=bounded(settings.max_queue),
                ws="none",
                timeout_graceful_shutdown=max(1, int(settings.drain_timeout)),
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )
        self._application, self._drain = application, settings.drain_timeout

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes, or the engine cannot be had."""
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
        self.should_exit = True

    def _stop(self) -> None:
        if self._application.draining:
            self.force_exit = True
        self._application.draining = True
        self.should_exit = True
        delay = max(0.0, self._drain - LAST_WORDS)
        cut = self._application.cut
        asyncio.get_running_loop().call_later(delay, cut, "the server is shutting down")
