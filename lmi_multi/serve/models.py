"""SageMaker's multi-model mode: models come and go by requests, each in an engine of its own.

When memory is short for one, those that nobody has asked for longest, and nobody asks now, lose
their engines. They stay loaded as far as SageMaker is concerned: the next request to one starts its
engine anew, which may cost another one its own. Where no engine can go the answer is 507, and
SageMaker unloads what it likes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmi_multi.checkpoint.files import gib
from lmi_multi.serve import body, described, sagemaker
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


@dataclass
class _Model:
    """A model that is loaded; `served` is None while it has no engine."""

    url: str
    folder: Path
    served: Served | None = None
    users: int = 0  # requests that have come and not been answered
    used: float = field(default_factory=time.monotonic)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def idle(self) -> bool:
        """Whether it has an engine that nobody would miss now."""
        return self.served is not None and not self.users and not self.served.engine.requests


class Models:
    """The models that are loaded, by name."""

    def __init__(self, settings: ServeSettings, read: Read, metrics: Metrics) -> None:
        self._root, self._limit = settings.models_root, settings.models_bytes
        self._drain = settings.drain_timeout
        self._read, self._metrics = read, metrics
        self._loaded: dict[str, _Model] = {}
        self._coming: set[str] = set()
        self._changing: list[Served] = []  # those that start or end

    def engines(self) -> list[EngineClient]:
        """Those of all models, also of those that come or go."""
        known = [m.served for m in self._loaded.values() if m.served is not None]
        return [served.engine for served in (*known, *self._changing)]

    async def load(self, name: str, url: str) -> None:
        """Load the model in the folder `url`. Raises HttpError: 400 for a name or a folder that is
        not allowed, 409 if the name is taken, 507 if memory is short, else 500."""
        if not _NAME.fullmatch(name):
            raise HttpError(
                400,
                f"model_name is {name!r:.80}; allowed: up to 256 letters, digits, '.', '_' and '-'",
                "model_name",
            )
        if self._find(name) is not None or name in self._coming:
            raise HttpError(409, f"model {name!r} is loaded already")
        model = _Model(url, self._folder(url))
        self._coming.add(name)
        try:
            model.served = await self._start(model.folder)
            self._loaded[name] = model
        finally:
            self._coming.remove(name)
        log.info("loaded %s from %s", name, model.folder)

    async def unload(self, name: str) -> None:
        """Let a model end what it answers, for as long as the server's own end may take, and free
        its memory. Raises HttpError 404 if it is not loaded."""
        model = self._get(name)
        async with model.changing:
            if self._loaded.pop(name, None) is None:
                raise _not_loaded(name)
            served, model.served = model.served, None
        if served is not None:
            await self._end(served, self._drain)
        log.info("unloaded %s", name)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Served]:
        """A model that is loaded, with an engine, which it keeps meanwhile. Raises HttpError 404
        if there is none of this name, and 507 or 500 where its engine cannot be started anew."""
        model = self._get(name)
        model.users += 1
        try:
            async with model.changing:
                if self._loaded.get(name) is not model:
                    raise _not_loaded(name)
                if model.served is None:
                    model.served = await self._start(model.folder)
                    log.info("started %s again", name)
                served = model.served
            yield served
        finally:
            model.users -= 1
            model.used = time.monotonic()

    def entry(self, name: str) -> dict[str, str]:
        """What SageMaker is told of a model. Raises HttpError 404 if it is not loaded."""
        return {"modelName": name, "modelUrl": self._get(name).url}

    def page(self, token: str) -> dict[str, Any]:
        """Up to `PAGE` models after the name `token`, and the token of the next page if there is
        one."""
        names = sorted(name for name in [*self._loaded] if name > token and self._find(name))
        shown: dict[str, Any] = {"models": [self.entry(name) for name in islice(names, PAGE)]}
        if len(names) > PAGE:
            shown["nextPageToken"] = names[PAGE - 1]
        return shown

    def _get(self, name: str) -> _Model:
        model = self._find(name)
        if model is None:
            raise _not_loaded(name)
        return model

    def _find(self, name: str) -> _Model | None:
        model = self._loaded.get(name)
        error = model and model.served and model.served.engine.error
        if error:
            # It will not come back by itself; SageMaker loads again what is not there.
            log.error("model %s is dropped: %s", name, error)
            del self._loaded[name]
            return None
        return model

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

    async def _start(self, folder: Path) -> Served:
        """An engine that has loaded the model in `folder`, in place of others if need be. Raises
        HttpError 507 if memory is short and nothing idle is left, else 400 or 500."""
        served = await asyncio.to_thread(self._prepare, folder)
        while True:
            try:
                await self._try(served)
                return served
            except HttpError as error:
                if error.status != 507 or not await self._evict():
                    raise
                served = await asyncio.to_thread(self._prepare, folder)

    def _prepare(self, folder: Path) -> Served:
        settings = self._read(folder)
        if settings.entry_point is not None:
            raise HttpError(400, "entry_point is set; allowed: none, as requests may run no code")
        return Served(settings, self._metrics)

    async def _try(self, served: Served) -> None:
        """Start its engine. Raises HttpError, 507 if memory is short, and leaves none."""
        free = psutil.virtual_memory().available
        if free < ENGINE_BYTES:
            raise HttpError(507, f"an engine needs {gib(ENGINE_BYTES)}, but {gib(free)} are free")
        engine = served.engine
        self._changing.append(served)
        try:
            await engine.start()
            await engine.started()
            if engine.error is not None:
                raise HttpError(507 if engine.lacked_memory else 500, engine.error)
            while self._limit is not None and (taken := self._taken()) > self._limit:
                if not await self._evict():
                    raise HttpError(
                        507,
                        f"with it the models take {gib(taken)}; allowed: models_bytes, which is "
                        f"{gib(self._limit)}",
                    )
        except BaseException:
            await engine.close()
            raise
        finally:
            self._changing.remove(served)

    def _taken(self) -> int:
        """Bytes of memory that all engines take."""
        return sum(engine.memory() for engine in self.engines())

    async def _evict(self) -> bool:
        """End the engine that was idle for longest; whether there was one."""
        idle = {name: model for name, model in self._loaded.items() if model.idle}
        if not idle:
            return False
        name = min(idle, key=lambda name: idle[name].used)
        served, idle[name].served = idle[name].served, None
        self._metrics.evicted.inc()
        log.info("evicting %s, which was idle for longest: memory is short", name)
        if served is not None:
            await self._end(served)
        return True

    async def _end(self, served: Served, patience: float = 0.0) -> None:
        """End an engine, once it has answered or `patience` seconds have gone."""
        self._changing.append(served)
        try:
            deadline = time.monotonic() + patience
            while served.engine.requests and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        finally:
            await served.engine.close()
            self._changing.remove(served)


def _not_loaded(name: str) -> HttpError:
    return HttpError(404, f"model {name!r:.80} is not loaded")


def router(models: Models, settings: ServeSettings, draining: Callable[[], bool]) -> APIRouter:
    """The routes. `draining` says whether the server is about to end."""
    routes = APIRouter(tags=["SageMaker"])

    def answers(whole: described.Json) -> dict[int | str, described.Json]:
        return described.answers(whole, described.PLAIN_ERROR, of_models=True)

    @routes.get("/ping", response_class=Response, responses={503: {"description": "about to end"}})
    async def ping() -> Response:
        """200 unless the server is about to end: models may be loaded."""
        return Response(status_code=503 if draining() else 200)

    @routes.get("/models", responses=answers(described.LOADED_PAGE))
    async def listed(next_page_token: str = "") -> dict[str, Any]:
        """The models that are loaded."""
        return models.page(next_page_token)

    @routes.post(
        "/models",
        openapi_extra=described.request(LoadRequest),
        responses=answers(described.LOADED),
    )
    async def load(request: Request) -> Response:
        """Load a model: 409 if it is there already, 507 if memory is short."""
        data = await body.read(request, settings.max_body_bytes)
        asked = body.check(LoadRequest, body.parse(data))
        await models.load(asked.model_name, asked.url)
        return JSONResponse(models.entry(asked.model_name))

    @routes.get("/models/{name}", responses=answers(described.LOADED))
    async def shown(name: str) -> dict[str, str]:
        """One model that is loaded."""
        return models.entry(name)

    @routes.delete("/models/{name}", responses=answers(described.UNLOADED))
    async def unload(name: str) -> Response:
        """Unload a model, once it has answered what it was asked."""
        await models.unload(name)
        return JSONResponse({"modelName": name})

    @routes.post("/models/{name}/invoke", **sagemaker.description(settings, of_models=True))
    async def invoke(name: str, request: Request) -> Response:
        """Ask a model: bodies and answers are those of `/invocations`."""
        async with models.use(name) as served:
            return await served.invoke(request)

    return routes
