"""What Prometheus sees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lmi_multi.errors import LmiError
from lmi_multi.serve.client import EngineClient
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.request_log import current
from lmi_multi.serve.tracing import Phases, Tracing
from lmi_multi.streaming import Chunk

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FINE = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, engines: Callable[[], Iterable[EngineClient]], tracing: Tracing) -> None:
        """`engines` gives those that run now; what they have is added up."""
        self._tracing = tracing
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "lmi_requests", "Prompts by how they ended", ["outcome"], registry=registry
        )
        for outcome in ("done", "failed", "aborted"):
            self._requests.labels(outcome)  # there from the start, so that rates have their zero
        self._prompt_tokens = Counter("lmi_prompt_tokens", "Tokens of prompts", registry=registry)
        self._tokens = Counter("lmi_generated_tokens", "Tokens generated", registry=registry)
        self._numerical = Counter(
            "lmi_numerical_errors", "Answers that ended with unusable logits", registry=registry
        )
        self.shed = Counter(
            "lmi_shed_requests", "Requests refused for lack of room", registry=registry
        )
        self.evicted = Counter(
            "lmi_evicted_models", "Engines ended to make room for others", registry=registry
        )
        self._queue = Histogram(
            "lmi_queue_seconds", "Time in the queue", buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "lmi_time_to_first_token_seconds",
            "Time to the first token, the queue included",
            buckets=_SECONDS,
            registry=registry,
        )
        self._between = Histogram(
            "lmi_inter_token_seconds", "Time between tokens", buckets=_FINE, registry=registry
        )
        self._whole = Histogram(
            "lmi_request_seconds", "Time to the last token", buckets=_SECONDS, registry=registry
        )
        for name, text, value in (
            ("lmi_in_flight", "Prompts being answered or waiting", lambda e: e.requests),
            ("lmi_batch_rows", "Rows that the running prompts may have", lambda e: e.state["rows"]),
            ("lmi_queue", "Prompts that wait for a row", lambda e: e.state["waiting"]),
            ("lmi_cache_blocks", "Cache blocks in use", lambda e: e.state["blocks"]),
            ("lmi_engine_steps", "Steps of the engine that runs", lambda e: e.state["steps"]),
            ("lmi_engine_restarts", "Engines started after the first", lambda e: e.restarts),
            ("lmi_engine_ready", "Engines that can answer", lambda e: e.ready.is_set()),
        ):
            gauge = Gauge(name, text, registry=registry)
            gauge.set_function(partial(_total, engines, value))

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)

    def request(self, prompt_tokens: int, answers: int = 1) -> Watch:
        """Begin to watch a prompt that is to have so many answers."""
        self._prompt_tokens.inc(prompt_tokens)
        if (record := current()) is not None:
            record.prompt_tokens += prompt_tokens
        return Watch(self, self._tracing.prompt(prompt_tokens), answers)


def _total(
    engines: Callable[[], Iterable[EngineClient]], value: Callable[[EngineClient], int]
) -> float:
    return float(sum(map(value, engines())))


class Watch:
    """One prompt's times and how it ended, which counts once, and for the log of its request."""

    def __init__(self, metrics: Metrics, phases: Phases, answers: int) -> None:
        self._metrics, self._phases, self._left = metrics, phases, answers
        self._record = current()
        self._ended = self._broken = False
        self._came = time.time_ns()
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last: dict[int, float] = {}  # when an answer's last chunk came
        self._tokens = 0

    def started(self, at: int) -> None:
        """The engine took it from the queue; `at` in nanoseconds since 1970."""
        self._metrics._queue.observe(max(0, at - self._came) / 1e9)
        self._phases.enter("prefill", at)

    def first(self) -> None:
        """Its first token is there."""
        self._phases.enter("decode")
        self._first = time.perf_counter()
        self._metrics._first.observe(self._first - self._start)
        if self._record is not None and self._record.first is None:
            self._record.first = self._first

    def chunk(self, chunk: Chunk) -> None:
        """A chunk came; the mean time between its tokens counts once."""
        now, metrics, tokens = time.perf_counter(), self._metrics, len(chunk.token_ids)
        last = self._last.get(chunk.answer, self._first)
        gaps = tokens - (chunk.answer not in self._last)  # none before an answer's first token
        if last is not None and gaps > 0 and chunk.score is None:  # beams come all at once
            metrics._between.observe((now - last) / gaps)
        self._last[chunk.answer] = now
        self._tokens += tokens
        metrics._tokens.inc(tokens)
        if self._record is not None:
            self._record.output_tokens += tokens
            if chunk.finish_reason is not None:
                self._record.finish_reasons.add(chunk.finish_reason)
        if chunk.finish_reason == "numerical_error":
            metrics._numerical.inc()
            self._broken = True
        self._left -= chunk.finish_reason is not None
        if not self._left:
            self.done()

    def done(self) -> None:
        """Every answer has ended; one that is broken fails the prompt."""
        if self._broken:
            self._end("failed", "numerical_error")
        else:
            self._end("done")

    def failed(self, error: LmiError | HttpError | None = None) -> None:
        """The engine or a script failed it, or its time was up."""
        failure = HttpError.of(error) if isinstance(error, LmiError) else error
        self._end("failed", "failed" if failure is None else failure.kind)

    def aborted(self) -> None:
        """Its client went away, or heard that one of its answers is broken."""
        if self._broken:
            self._end("failed", "numerical_error")
        else:
            self._end("aborted", "client_gone")

    def _end(self, outcome: str, error: str | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        if error is not None and self._record is not None:
            self._record.error = error
        self._phases.done(outcome, self._tokens)
        self._metrics._requests.labels(outcome).inc()
        if outcome == "done":
            self._metrics._whole.observe(time.perf_counter() - self._start)
