"""Connections with the bounds that uvicorn leaves to a proxy: how many, and how slow."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmi_multi.serve.errors import HttpError

HEAD_SECONDS = 10.0
"""Seconds in which a request's line and headers must have come."""
READ_SECONDS = 30.0
"""Seconds after which a client counts as gone that takes nothing of what it is sent."""
SEND_BYTES = 2**17
"""What the system keeps of an answer until the client takes it; Linux makes twice of it. Left to
itself it keeps megabytes, and would not tell for as long that a slow client takes them."""
SPARE = 1024
"""Connections beside those whose requests may wait: to be told that there is no room, or to ask how
the server is."""
_FILES = 256  # open files that are not connections

log = logging.getLogger(__name__)


def _closing(status: int, reason: str, message: str, headers: str) -> bytes:
    """A whole answer to a connection whose request is not read, in the form of every error."""
    body = json.dumps(HttpError(status, message).plain()).encode()
    head = (
        f"HTTP/1.1 {status} {reason}\r\n{headers}Connection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class BoundedProtocol(H11Protocol):
    """A connection over h11, which bounds the size of headers as uvicorn's other protocol, over
    httptools, does not. Beyond `most` connections one is told so and closed; so is one whose next
    request has begun and not got through its headers in `HEAD_SECONDS`, or never begins. One whose
    client takes nothing for `READ_SECONDS` is reset."""

    most: int

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that it is told of anything that is not taken
        own = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        if len(self.connections) > self.most:
            message = f"{self.most} connections are open; try again later"
            self._refuse(503, "Service Unavailable", message, "Retry-After: 1\r\n")
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
        self._forget_unread()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`: the client is slower than the answer."""
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._forget_unread()
        super().resume_writing()

    def _watch_unread(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(READ_SECONDS, self._judge_unread, size)

    def _judge_unread(self, before: int) -> None:
        # Nothing is added meanwhile, but for the little that uvicorn itself has to say.
        if self.transport.get_write_buffer_size() < before:
            self._watch_unread()
            return
        log.warning("a connection is reset: its client has read nothing for %g s", READ_SECONDS)
        self.transport.abort()

    def _forget_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._give_up_head)

    def _give_up_head(self) -> None:
        message = f"no headers came within {HEAD_SECONDS:g} s"
        self._refuse(408, "Request Timeout", message)

    def _forget_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, reason: str, message: str, headers: str = "") -> None:
        if not self.transport.is_closing():
            log.info("a connection is refused with %d: %s", status, message)
            self.transport.write(_closing(status, reason, message, headers))
            self.transport.close()


def bounded(requests: int) -> type[BoundedProtocol]:
    """The protocol of a server that lets so many requests wait."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = requests + SPARE if files == resource.RLIM_INFINITY else files - _FILES

    class Bounded(BoundedProtocol):
        most = max(1, min(requests + SPARE, allowed))

    return Bounded
