"""A server that is told more than once to stop, as by somebody who presses Ctrl-C again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.serve.running import LONG, ROOM, serving, silent_collector


def test_a_second_signal_cuts_what_runs(tmp_path: Path) -> None:
    """With an answer that says why, long before the time that requests have to end."""
    with serving(tmp_path, "demo", "--drain-timeout", "600", ROOM) as server:
        server.wait_ready()
        engine = server.engine()
        with server.asking("/invocations", LONG) as connection:
            server.until(lambda: server.gauge("lmi_batch_rows") == 1)
            server.process.send_signal(signal.SIGINT)
            server.until(lambda: "Waiting for connections" in server.log.read_text())
            server.process.send_signal(signal.SIGINT)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            assert server.process.wait(60) == 0
        engine.wait(60)
    assert answer.startswith(b"HTTP/1.1 503") and b"the server is shutting down" in answer
    assert "Traceback" not in server.log.read_text()


def test_a_third_signal_ends_what_hangs(tmp_path: Path) -> None:
    """A collector of traces that takes them and never answers, and a drain of ten minutes."""
    pytest.importorskip("opentelemetry.sdk")
    with (
        silent_collector(600) as endpoint,
        serving(tmp_path, "demo", "--drain-timeout", "600", **endpoint) as server,
    ):
        server.wait_ready()
        assert server.post("/invocations", {"inputs": "ten"}).status_code == 200
        engine = server.engine()
        for said in ("Waiting for application shutdown", "told once more"):
            server.process.send_signal(signal.SIGINT)
            server.until(lambda said=said: said in server.log.read_text())
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        engine.wait(60)
    log = server.log.read_text()
    assert "told three times" in log and "Traceback" not in log
