"""OpenTelemetry's spans of requests and prompts, where its environment variables ask for them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastapi import FastAPI

from lmi_multi.errors import OptionError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether spans are to be exported: an endpoint is named, and nothing switches them off."""
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    off = off or environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
    return not off and any(environ.get(name) for name in ENDPOINTS)


class Tracing:
    """Spans of every request to an application, and of its prompts; nothing unless wanted.

    Raises OptionError where spans are wanted and OpenTelemetry is not installed.
    """

    def __init__(self, app: FastAPI) -> None:
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        if not wanted(os.environ):
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise OptionError(
                f"{' or '.join(ENDPOINTS)} is set, and {error.name} is not installed: "
                "pip install 'lmi_multi[otel]'"
            ) from None
        name = os.environ.get("OTEL_SERVICE_NAME", "lmi_multi")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("lmi_multi")
        FastAPIInstrumentor.instrument_app(
            app,
            tracer_provider=self._provider,
            excluded_urls="/ping,/metrics",
            exclude_spans=["receive", "send"],  # one for each token of a stream
        )

    def prompt(self, tokens: int) -> Phases:
        """Begin the phases of a prompt, below the span of the request that is being answered."""
        return Phases(self._tracer, tokens)

    def close(self) -> None:
        """Export what has not been yet."""
        if self._provider is not None:
            self._provider.shutdown()


def _current() -> Context:
    from opentelemetry.context import get_current

    return get_current()


class Phases:
    """A prompt's spans, one after the other: queue, prefill, decode."""

    def __init__(self, tracer: Tracer | None, tokens: int) -> None:
        self._tracer = tracer
        self._request = None if tracer is None else _current()
        self._prompt_tokens = tokens
        self._phase, self._since = "queue", time.time_ns()

    def enter(self, phase: str, at: int | None = None) -> None:
        """End the current phase and begin another; `at` in nanoseconds since 1970, else now.
        Nothing happens where `phase` is the current one."""
        if phase == self._phase:
            return
        now = at or time.time_ns()
        self._end(now)
        self._phase, self._since = phase, now

    def done(self, outcome: str, tokens: int) -> None:
        """End the last phase."""
        self._end(time.time_ns(), outcome=outcome, generated_tokens=tokens)

    def _end(self, now: int, **more: str | int) -> None:
        if self._tracer is None:
            return
        attributes = {"prompt_tokens": self._prompt_tokens} | more
        named = {f"lmi_multi.{name}": value for name, value in attributes.items()}
        span = self._tracer.start_span(
            self._phase, self._request, start_time=self._since, attributes=named
        )
        span.end(now)
