"""One engine and what answers through it: a model, or a script of the user's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from lmi_multi.serve import sagemaker
from lmi_multi.serve.client import EngineClient
from lmi_multi.serve.metrics import Metrics
from lmi_multi.serve.scripted import ScriptService, script_arguments
from lmi_multi.serve.service import Service
from lmi_multi.serve.settings import ServeSettings


class Served:
    """What one set of settings asks for. `service` is None where a script answers."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        script = settings.entry_point is not None
        self.engine = EngineClient(
            script_arguments(settings) if script else settings.load_arguments(),
            max_requests=settings.max_queue,
            max_tokens=settings.max_queue_tokens,
            startup_timeout=settings.startup_timeout,
            log_format=settings.log_format,
            # A script says nothing until it has answered.
            step_timeout=settings.request_timeout if script else settings.step_timeout,
        )
        self.service: Service | None = None
        self.invoke: Callable[[Request], Awaitable[Response]]
        if script:
            self.invoke = ScriptService(self.engine, metrics, settings).invoke
        else:
            self.service = Service(self.engine, metrics, settings.request_timeout)
            self.invoke = sagemaker.invoker(self.service, settings)
