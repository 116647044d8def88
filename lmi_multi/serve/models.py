"""SageMaker's multi-model mode: models come and go by requests, each in an engine of its own.

Which model goes when memory is short is SageMaker's to say: it is told 507, unloads what it has not
used for longest, and asks again.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmi_multi.checkpoint.files import gib
from lmi_multi.serve import body
from lmi_multi.serve.client import EngineClient
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.metrics import Metrics
from lmi_multi.serve.served import Served
from lmi_multi.serve.settings import ServeSettings

log = logging.getLogger(__name__)

ENGINE_BYTES = 256 * 2**20
"""What an engine's process takes beside its model: 218 MiB were measured, with the demo model on a
CPU. Whether the model fits is its backend's to say."""
PAGE = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,255}")

Read = Callable[[Path], ServeSettings]
"""The settings of the model in a folder."""


class LoadRequest(BaseModel):
    """The body of `POST /models`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model_name: str
    url: str


class Models:
    """The models that are loaded, by name."""

    def __init__(self, root: Path, read: Read, metrics: Metrics, drain: float) -> None:
        self._root, self._read, self._metrics, self._drain = root, read, metrics, drain
        self._loaded: dict[str, tuple[str, Served]] = {}
        self._starting: dict[str, Served | None] = {}
        self._leaving: list[Served] = []

    def engines(self) -> list[EngineClient]:
        """Those of all models, also of those that come or go."""
        known = [served for _, served in self._loaded.values()]
        known += [served for served in self._starting.values() if served is not None]
        return [served.engine for served in (*known, *self._leaving)]

    async def load(self, name: str, url: str) -> None:
        """Load the model in the folder `url`. Raises HttpError: 400 for a name or a folder that is
        not allowed, 409 if the name is taken, 507 if memory is short, else 500."""
        if not _NAME.fullmatch(name):
            raise HttpError(
                400,
                f"model_name is {name!r:.80}; allowed: up to 256 letters, digits, '.', '_' and '-'",
                "model_name",
            )
        if self._find(name) is not None or name in self._starting:
            raise HttpError(409, f"model {name!r} is loaded already")
        folder = self._folder(url)
        self._starting[name] = None
        try:
            served = await asyncio.to_thread(self._prepare, folder)
            self._starting[name] = served
            await self._start(served)
            self._loaded[name] = (url, served)
        finally:
            del self._starting[name]
        log.info("loaded %s from %s", name, folder)

    async def unload(self, name: str) -> None:
        """Let a model end what it answers, for as long as the server's own end may take, and free
        its memory. Raises HttpError 404 if it is not loaded."""
        served = self.get(name)
        del self._loaded[name]
        self._leaving.append(served)
        try:
            deadline = time.monotonic() + self._drain
            while served.engine.requests and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        finally:
            await served.engine.close()
            self._leaving.remove(served)
        log.info("unloaded %s", name)

    def get(self, name: str) -> Served:
        """A model that is loaded. Raises HttpError 404 if there is none of this name."""
        served = self._find(name)
        if served is None:
            raise HttpError(404, f"model {name!r:.80} is not loaded")
        return served

    def entry(self, name: str) -> dict[str, str]:
        """What SageMaker is told of a model. Raises what `get` raises."""
        self.get(name)
        return {"modelName": name, "modelUrl": self._loaded[name][0]}

    def page(self, token: str) -> dict[str, Any]:
        """Up to `PAGE` models after the name `token`, and the token of the next page if there is
        one."""
        names = sorted(name for name in [*self._loaded] if name > token and self._find(name))
        shown: dict[str, Any] = {"models": [self.entry(name) for name in islice(names, PAGE)]}
        if len(names) > PAGE:
            shown["nextPageToken"] = names[PAGE - 1]
        return shown

    def _find(self, name: str) -> Served | None:
        _, served = self._loaded.get(name, ("", None))
        if served is not None and served.engine.error is not None:
            # It will not come back by itself; SageMaker loads again what is not there.
            log.error("model %s is dropped: %s", name, served.engine.error)
            del self._loaded[name]
            return None
        return served

    def _folder(self, url: str) -> Path:
        """The folder under the root that `url` names, symbolic links followed."""
        try:
            folder = Path(url).resolve()
            allowed = folder.is_relative_to(self._root.resolve()) and folder.is_dir()
        except (OSError, RuntimeError, ValueError):  # NUL, a loop of links, too long
            allowed = False
        if not allowed:
            raise HttpError(400, f"url is {url!r:.200}; allowed: a folder in {self._root}", "url")
        return folder

    def _prepare(self, folder: Path) -> Served:
        settings = self._read(folder)
        if settings.entry_point is not None:
            raise HttpError(400, "entry_point is set; allowed: none, as requests may run no code")
        free = psutil.virtual_memory().available
        if free < ENGINE_BYTES:
            raise HttpError(507, f"an engine needs {gib(ENGINE_BYTES)}, but {gib(free)} are free")
        return Served(settings, self._metrics)

    async def _start(self, served: Served) -> None:
        engine = served.engine
        try:
            await engine.start()
            await engine.started()
        except BaseException:
            await engine.close()
            raise
        if engine.error is not None:
            raise HttpError(507 if engine.lacked_memory else 500, engine.error)


def router(models: Models, settings: ServeSettings, draining: Callable[[], bool]) -> APIRouter:
    """The routes. `draining` says whether the server is about to end."""
    routes = APIRouter(tags=["SageMaker"])

    @routes.get("/ping")
    async def ping() -> Response:
        """200 unless the server is about to end: models may be loaded."""
        return Response(status_code=503 if draining() else 200)

    @routes.get("/models")
    async def listed(next_page_token: str = "") -> dict[str, Any]:
        """The models that are loaded."""
        return models.page(next_page_token)

    schema = {"schema": LoadRequest.model_json_schema()}

    @routes.post(
        "/models", openapi_extra={"requestBody": {"content": {"application/json": schema}}}
    )
    async def load(request: Request) -> Response:
        """Load a model: 409 if it is there already, 507 if memory is short."""
        data = await body.read(request, settings.max_body_bytes)
        asked = body.check(LoadRequest, body.parse(data))
        await models.load(asked.model_name, asked.url)
        return JSONResponse(models.entry(asked.model_name))

    @routes.get("/models/{name}")
    async def shown(name: str) -> dict[str, str]:
        """One model that is loaded."""
        return models.entry(name)

    @routes.delete("/models/{name}")
    async def unload(name: str) -> Response:
        """Unload a model, once it has answered what it was asked."""
        await models.unload(name)
        return JSONResponse({"modelName": name})

    @routes.post("/models/{name}/invoke")
    async def invoke(name: str, request: Request) -> Response:
        """Ask a model: bodies and answers are those of `/invocations`."""
        return await models.get(name).invoke(request)

    return routes
