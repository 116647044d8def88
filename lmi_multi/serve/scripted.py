"""A server's side of a script of the user's own."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lmi_multi.errors import LmiError, OptionError
from lmi_multi.serve import body, wire
from lmi_multi.serve.client import EngineClient
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.metrics import Metrics
from lmi_multi.serve.names import OPTIONS
from lmi_multi.serve.service import while_connected
from lmi_multi.serve.settings import ServeSettings

log = logging.getLogger(__name__)

_NOT_THE_SCRIPT_S = ("api_key", "entry_point", "host", "port", "engine", "fallback")


class ScriptService:
    """A script as the routes see it: bodies in, bodies or streams out."""

    def __init__(self, engine: EngineClient, metrics: Metrics, settings: ServeSettings) -> None:
        self._engine, self._metrics = engine, metrics
        self._limit, self._timeout = settings.max_body_bytes, settings.request_timeout

    async def invoke(self, request: Request) -> Response:
        """What the script answers to a request. Raises HttpError where it fails, or takes longer
        than a request may."""
        data = await body.read(request, self._limit)
        if not data:
            raise HttpError(400, "the body is empty, which is no request to a script")
        headers = {
            name: value for name, value in request.headers.items() if name != "authorization"
        }
        messages = self._watched(self._engine.invoke(data, headers, self._timeout))
        head: wire.Message = await while_connected(request, _head(messages))
        if "error" in head:
            raise HttpError(head["code"], head["error"])
        if head["last"]:
            content = wire.content(head["content"])
            return Response(content, status_code=head["code"], headers=head["headers"])
        parts = self._parts(messages, head["headers"].get("content-type", ""))
        return StreamingResponse(parts, status_code=head["code"], headers=head["headers"])

    async def _watched(self, messages: AsyncGenerator[wire.Message]) -> AsyncGenerator[Any]:
        """The same messages, counted."""
        watch = self._metrics.request(0)
        failed = False
        try:
            async with contextlib.aclosing(messages):
                async for message in messages:
                    failed = "error" in message
                    yield message
            (watch.failed if failed else watch.done)()
        except LmiError as error:
            watch.failed(error)
            raise
        except BaseException:
            watch.aborted()
            raise

    async def _parts(self, messages: AsyncGenerator[Any], kind: str) -> AsyncIterator[bytes]:
        try:
            async with contextlib.aclosing(messages):
                async for message in messages:
                    if "error" in message:
                        raise HttpError(message["code"], message["error"])
                    yield wire.content(message["content"])
        except (LmiError, HttpError) as error:
            failure = error if isinstance(error, HttpError) else HttpError.of(error)
            log.warning("a stream ends early: %s", failure.message)
            line = json.dumps(failure.plain())
            event = kind.startswith("text/event-stream")
            yield (f"data: {line}\n\n" if event else f"{line}\n").encode()


async def _head(messages: AsyncGenerator[wire.Message]) -> wire.Message:
    """The first message; what follows is a stream's."""
    head = await anext(messages)
    if head["last"]:
        async for _ in messages:  # it ends here, and notes that
            pass
    return head


def script_arguments(settings: ServeSettings) -> dict[str, Any]:
    """What the engine's process is told: the script, and the options that are set, as strings under
    the names that DJL's handlers know them by."""
    script = settings.entry_point
    if script is None:
        raise OptionError("entry_point is None; allowed: the settings of a script")
    own = {
        option.properties[0].removeprefix("option."): getattr(settings, option.field)
        for option in OPTIONS
        if option.field in settings.model_fields_set and option.field not in _NOT_THE_SCRIPT_S
    }
    if "dtype" in own and settings.quantize is not None:
        own["dtype"] = settings.quantize  # where handlers look for it
    folder = Path(settings.model or "")
    own |= {
        "model_dir": folder.absolute() if settings.model and folder.is_dir() else script.parent,
        "tensor_parallel_degree": settings.degree(),
        "pipeline_parallel_degree": settings.pipeline_parallel,
    }
    properties = {name: _property(value) for name, value in own.items() if value is not None}
    return {"script": str(script), "properties": properties}


def _property(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
