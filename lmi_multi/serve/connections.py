"""Connections with the bounds that uvicorn leaves to a proxy: how many, and how slow."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""Seconds in which a request's line and headers must have come."""
SPARE = 1024
"""Connections beside those whose requests may wait: to be told that there is no room, or to ask how
the server is."""
_FILES = 256  # open files that are not connections

_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)


class BoundedProtocol(H11Protocol):
    """A connection over h11, which bounds the size of headers as uvicorn's other protocol, over
    httptools, does not. Beyond `most` connections one is told so and closed; so is one whose next
    request has begun and not got through its headers in `HEAD_SECONDS`, or never begins."""

    most: int

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(_FULL)
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._forget_head()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._refuse, _SLOW)

    def _forget_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()


def bounded(requests: int) -> type[BoundedProtocol]:
    """The protocol of a server that lets so many requests wait."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = requests + SPARE if files == resource.RLIM_INFINITY else files - _FILES

    class Bounded(BoundedProtocol):
        most = max(1, min(requests + SPARE, allowed))

    return Bounded
