"""The application: routes, errors, authorization."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Iterator

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmi_multi.errors import LmiError
from lmi_multi.serve import models, openai, sagemaker
from lmi_multi.serve.client import EngineClient
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.failures import OverloadedError
from lmi_multi.serve.metrics import Metrics
from lmi_multi.serve.request_log import HEADER, Logged, current
from lmi_multi.serve.served import Served
from lmi_multi.serve.settings import ServeSettings
from lmi_multi.serve.tracing import Tracing

log = logging.getLogger(__name__)


class Application:
    """A FastAPI application around one engine, which lives as long as the application runs; or
    around none, and models that requests load: `read` gives the settings of each."""

    def __init__(self, settings: ServeSettings, name: str, read: models.Read) -> None:
        self.app = FastAPI(title="lmi_multi", lifespan=self._lifespan)
        self.tracing = Tracing(self.app)
        self.metrics = Metrics(self._engines, self.tracing)
        self._draining = asyncio.Event()
        self._served: Served | None = None
        self._models = models.Models(settings, read, self.metrics)
        for router in self._routers(settings, name):
            self.app.include_router(router)
        self.app.add_api_route(
            "/metrics",
            self._show_metrics,
            tags=["Operation"],
            response_class=PlainTextResponse,
        )
        self.app.add_exception_handler(HttpError, self._failed)
        self.app.add_exception_handler(LmiError, self._failed)
        self.app.add_exception_handler(HTTPException, self._refused)
        self.app.add_exception_handler(Exception, self._broken)
        self.app.add_middleware(_Draining, draining=self._draining)
        if settings.api_key is not None:
            key = settings.api_key.get_secret_value()
            self.app.add_middleware(_Authorized, key=key)
        self.app.add_middleware(Logged)

    def _routers(self, settings: ServeSettings, name: str) -> Iterator[APIRouter]:
        if settings.multi_model:
            yield models.router(self._models, settings, lambda: self.draining)
            return
        self._served = served = Served(settings, self.metrics)
        yield sagemaker.router(served.invoke, served.engine, settings, lambda: self.draining)
        if served.service is not None:
            yield openai.router(served.service, settings.max_body_bytes, name)

    def _engines(self) -> list[EngineClient]:
        return self._models.engines() if self._served is None else [self._served.engine]

    @property
    def error(self) -> str | None:
        """Why nothing can be answered any more; models that requests load may always come."""
        return None if self._served is None else self._served.engine.error

    @property
    def failed(self) -> bool:
        """Whether that is the engine's own fault."""
        return self._served is not None and self._served.engine.failed

    @property
    def draining(self) -> bool:
        """Whether the server is about to end."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Accept no more work: a request whose body is not whole yet is refused now."""
        self._draining.set()

    def cut(self, reason: str) -> None:
        """Fail everything that is being answered, as there is no more time for it."""
        for engine in self._engines():
            engine.cut(reason)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        if self._served is not None:
            await self._served.engine.start()
        try:
            yield
        finally:
            await asyncio.gather(*(engine.close() for engine in self._engines()))
            await asyncio.to_thread(self.tracing.close)

    async def _show_metrics(self) -> Response:
        """Prometheus's text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _failed(self, request: Request, error: Exception) -> Response:
        failure = error if isinstance(error, HttpError) else HttpError.of(error)  # type: ignore[arg-type]
        if isinstance(error, OverloadedError):
            self.metrics.shed.inc()
        return _answer(request.scope, failure)

    async def _refused(self, request: Request, error: Exception) -> Response:
        found = error if isinstance(error, HTTPException) else HTTPException(500)
        headers = dict(found.headers or {})
        if found.status_code == 405:
            headers["Allow"] = ", ".join(sorted(self._methods(request.scope)))
        return _answer(request.scope, HttpError(found.status_code, found.detail, headers=headers))

    def _methods(self, scope: Scope) -> set[str]:
        """Those of all routes of a path; Starlette knows only the first one's."""
        own = [route for route in self.app.routes if isinstance(route, Route)]
        found = (route for route in own if route.matches(scope)[0] is not Match.NONE)
        return {method for route in found for method in route.methods or ()}

    async def _broken(self, request: Request, error: Exception) -> Response:
        """This one answers beside `Logged`, not through it."""
        record = current()
        log.error("request %s failed", record and record.id, exc_info=error)
        failure = HttpError(500, "something went wrong here; the log says what")
        if record is not None:
            failure.headers[HEADER.decode()] = record.id
        return _answer(request.scope, failure)


def _answer(scope: Scope, failure: HttpError) -> Response:
    if (record := current()) is not None:
        record.error = failure.kind
    shape = failure.openai() if scope["path"].startswith("/v1/") else failure.plain()
    return JSONResponse(shape, status_code=failure.status, headers=failure.headers)


class _Authorized:
    """Lets through only what carries the key as a bearer token; `/ping` is open."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/ping":
            given = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, token = given.partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
                headers = {"WWW-Authenticate": "Bearer"}
                failure = HttpError(401, "the request carries no valid bearer token", None, headers)
                await _answer(scope, failure)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Draining:
    """Refuses new work while the server ends; work that has not wholly come is new."""

    def __init__(self, app: ASGIApp, draining: asyncio.Event) -> None:
        self._app, self._draining = app, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif self._draining.is_set():
            await _answer(scope, _shutting_down())(scope, receive, send)
        else:
            await self._app(scope, self._whole(receive), send)

    def _whole(self, receive: Receive) -> Receive:
        """`receive` that raises HttpError 503 for the rest of a body once the server ends."""
        ended = False

        async def received() -> Message:
            nonlocal ended
            message = await (receive() if ended else self._before_the_end(receive))
            ended = not message.get("more_body", False)
            return message

        return received

    async def _before_the_end(self, receive: Receive) -> Message:
        part = asyncio.ensure_future(receive())
        end = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait([part, end], return_when=asyncio.FIRST_COMPLETED)
            if not part.done():
                raise _shutting_down()
            return part.result()
        finally:
            part.cancel()
            end.cancel()


def _shutting_down() -> HttpError:
    headers = {"Retry-After": "5", "Connection": "close"}
    return HttpError(503, "the server is shutting down", headers=headers, kind="draining")
