"""A server that is told more than once to stop, as by somebody who presses Ctrl-C again."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.serve.running import LONG, serving

MINUTES = {**LONG, "inputs": ["ten"] * 64}


def test_a_second_signal_cuts_what_runs(tmp_path: Path) -> None:
    """With an answer that says why, long before the time that requests have to end."""
    with serving(tmp_path, "demo", "--drain-timeout", "600") as server:
        server.wait_ready()
        engine = server.engine()
        with server.asking("/invocations", MINUTES) as connection:
            server.until(lambda: server.gauge("lmi_batch_rows") > 1)
            server.process.send_signal(signal.SIGINT)
            server.until(lambda: "Waiting for connections" in server.log.read_text())
            server.process.send_signal(signal.SIGINT)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            assert server.process.wait(60) == 0
        engine.wait(10)
    assert answer.startswith(b"HTTP/1.1 503") and b"the server is shutting down" in answer
    assert "Traceback" not in server.log.read_text()


def test_a_third_signal_ends_it_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--drain-timeout", "600") as server:
        server.wait_ready()
        engine = server.engine()
        with server.asking("/invocations", MINUTES):
            server.until(lambda: server.gauge("lmi_batch_rows") > 1)
            server.process.send_signal(signal.SIGINT)
            server.until(lambda: "Waiting for connections" in server.log.read_text())
            engine.suspend()  # putting things in order takes time with it
            server.process.send_signal(signal.SIGINT)
            server.until(lambda: "engine_gone" in server.log.read_text())
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(30) == 0
            engine.resume()
            engine.wait(10)  # it ends by itself
    log = server.log.read_text()
    assert "without putting its things in order" in log and "Traceback" not in log
