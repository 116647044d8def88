"""One line in the log for each request: what it was and how it went, and nothing that it said."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
"""The header that every answer brings its request's id in."""
_GIVEN = (b"x-amzn-sagemaker-inference-id", HEADER)
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_QUIET = ("/ping", "/metrics")  # asked again and again by what watches the server

log = logging.getLogger(__name__)

_current: ContextVar[Record | None] = ContextVar("record", default=None)


@dataclass
class Record:
    """How a request goes, told by those that answer it. `first` is `time.perf_counter()` at the
    first token of the first of its prompts; `error` a word for the kind of failure."""

    id: str
    method: str
    start: float = field(default_factory=time.perf_counter)
    status: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first: float | None = None
    finish_reasons: set[str] = field(default_factory=set)
    error: str | None = None

    def fields(self, scope: Scope) -> dict[str, Any]:
        """What is logged. The route is one of ours, never the path that was sent."""
        route = getattr(scope.get("route"), "path", None)
        model = scope.get("path_params", {}).get("name") if self.status != 404 else None
        found = {
            "id": self.id,
            "method": self.method,
            "route": route,
            "model": model,
            "status": self.status,
            "seconds": round(time.perf_counter() - self.start, 6),
            "first_token_seconds": self.first and round(self.first - self.start, 6),
            "prompt_tokens": self.prompt_tokens or None,
            "output_tokens": self.output_tokens if self.prompt_tokens else None,
            "finish_reasons": ",".join(sorted(self.finish_reasons)) or None,
            "error": self.error,
        }
        return {name: value for name, value in found.items() if value is not None}


def current() -> Record | None:
    """The record of the request that is being answered here, if any."""
    return _current.get()


class Logged:
    """Gives each request an id, the caller's own where it brings one that is fit for a log, and
    logs it once it is answered: failures of the server as warnings, `/ping` and `/metrics` at
    debug, the others at info."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(_id(scope["headers"]), scope["method"])
        _current.set(record)  # a request has a task of its own

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                named = (HEADER, record.id.encode())
                others = [pair for pair in message.get("headers", ()) if pair[0].lower() != HEADER]
                message = {**message, "headers": [*others, named]}
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except BaseException:
            record.status = record.status or 500
            record.error = record.error or "failed"
            raise
        finally:
            _log(record, scope)


def _log(record: Record, scope: Scope) -> None:
    broken = record.status < 400 and record.error not in (None, "client_gone")  # in mid-stream
    if scope["path"] in _QUIET and record.error is None:
        level = logging.DEBUG
    else:
        level = logging.WARNING if record.status >= 500 or broken else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "request", extra={"fields": record.fields(scope)})


def _id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = dict(headers)
    for name in _GIVEN:
        if _ID.fullmatch(given.get(name, b"")):
            return given[name].decode()
    return uuid.uuid4().hex
