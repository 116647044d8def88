"""Traces as a collector gets them: a server of OTLP over HTTP on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmi_multi.serve.tracing import wanted
from tests.serve.running import serving

service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Its address, and the spans that it got."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            request = service.ExportTraceServiceRequest.FromString(data)
            scopes = [scope for one in request.resource_spans for scope in one.scope_spans]
            spans.extend(span for scope in scopes for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.int_value or a.value.string_value for a in span.attributes}


def test_spans_of_a_request_and_its_prompts(
    tmp_path: Path, collector: tuple[str, list[Any]]
) -> None:
    url, spans = collector
    options = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
    with serving(tmp_path, "demo", "--max-batch", "1", **options) as server:
        server.wait_ready()
        body = {"inputs": ["ten", "twenty"], "parameters": {"max_new_tokens": 2}}
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        answer = server.post("/invocations", body, headers={"traceparent": parent})
        assert answer.status_code == 200
        assert server.gauge("lmi_queue_seconds_count") == 2
        assert server.stop() == 0  # what has not been sent yet is sent now
    [request] = [span for span in spans if span.name == "POST /invocations"]
    assert request.trace_id.hex() == parent.split("-")[1]
    inside = [span for span in spans if span.parent_span_id == request.span_id]
    assert len(inside) == len(spans) - 1 == 6  # and none of /ping or /metrics
    phases = [
        sorted((span for span in inside if span.name == name), key=_end)
        for name in ("queue", "prefill", "decode")
    ]
    for queue, prefill, decode in zip(*phases, strict=True):
        assert queue.start_time_unix_nano < _end(queue)
        assert _end(queue) == prefill.start_time_unix_nano < _end(prefill)
        assert _end(prefill) == decode.start_time_unix_nano < _end(decode)
        assert attributes(decode)["lmi_multi.outcome"] == "done"
        assert attributes(decode)["lmi_multi.generated_tokens"] == 2
    left_queue = [_end(span) for span in phases[0]]
    assert phases[0][1].start_time_unix_nano < left_queue[0] < left_queue[1]  # there is one row


def _end(span: Any) -> int:
    return int(span.end_time_unix_nano)


def test_nothing_is_traced_unless_asked() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    assert not wanted({})
    assert wanted(endpoint)
    assert wanted({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"})
    assert not wanted(endpoint | {"OTEL_TRACES_EXPORTER": "none"})
    assert not wanted(endpoint | {"OTEL_SDK_DISABLED": "true"})
