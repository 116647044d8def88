"""What goes wrong while a server runs: clients that leave, engines that die or hang, overload."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serve.running import Running, serving

# Some seconds' worth of tokens, if nobody ends it.
LONG: dict[str, Any] = {
    "inputs": "ten",
    "parameters": {"max_new_tokens": 1900, "ignore_eos": True, "min_new_tokens": 1900},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("faults"), "demo", "--max-batch", "2") as running:
        running.wait_ready()
        yield running


def test_a_client_that_leaves_a_stream_frees_its_place(server: Running) -> None:
    with server.client.stream("POST", "/invocations", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.gauge("lmi_in_flight") == 1
    server.until(lambda: server.gauge("lmi_in_flight") == 0)
    server.until(lambda: server.gauge("lmi_batch_rows") == 0)
    server.until(lambda: server.gauge('lmi_requests_total{outcome="aborted"}') >= 1)


def test_a_client_that_leaves_before_its_answer_frees_its_place(server: Running) -> None:
    aborted = 'lmi_requests_total{outcome="aborted"}'
    before = server.gauge(aborted)
    body = json.dumps(LONG).encode()
    address = server.client.base_url.host, server.client.base_url.port or 0
    with socket.create_connection(address) as connection:
        head = f"POST /invocations HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.until(lambda: server.gauge("lmi_in_flight") == 1)
    server.until(lambda: server.gauge("lmi_in_flight") == 0)
    server.until(lambda: server.gauge(aborted) == before + 1)


def test_an_engine_that_is_killed_is_replaced(server: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(server.post, "/invocations", LONG)
        server.until(lambda: server.gauge("lmi_batch_rows") == 1)
        engine = server.engine()
        engine.kill()
        answer = pending.result(20)
    assert answer.status_code == 503 and "killed by signal 9" in answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    server.until(lambda: server.ping() == 200)
    answer = server.post("/invocations", {"inputs": "ten"})
    assert answer.json() == {"generated_text": "10"}
    assert server.gauge("lmi_engine_restarts") >= 1


def test_an_engine_that_hangs_is_replaced(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--step-timeout", "5") as server:
        server.wait_ready()
        with server.client.stream("POST", "/invocations", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.engine().suspend()
            start = time.monotonic()
            last = [line for line in lines if line][-1]
            assert time.monotonic() - start < 30
        assert "said nothing for 5 s" in json.loads(last)["error"]
        server.until(lambda: server.ping() == 200)
        assert server.post("/invocations", {"inputs": "ten"}).status_code == 200


def test_a_full_queue_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--max-queue", "2") as server:
        server.wait_ready()
        leave = threading.Event()

        def occupy() -> None:
            body = LONG | {"stream": True}
            with server.client.stream("POST", "/invocations", json=body) as answer:
                lines = answer.iter_lines()  # which would close the connection if dropped
                next(lines)
                leave.wait(60)

        with ThreadPoolExecutor(2) as pool:
            tasks = [pool.submit(occupy) for _ in range(2)]
            server.until(lambda: server.gauge("lmi_in_flight") == 2)
            answer = server.post("/invocations", {"inputs": "ten"})
            leave.set()
            for task in tasks:
                task.result(30)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert server.gauge("lmi_shed_requests_total") == 1
        server.until(lambda: server.gauge("lmi_in_flight") == 0)
        assert server.post("/invocations", {"inputs": "ten"}).status_code == 200


def test_a_request_has_its_time(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--request-timeout", "0.4") as server:
        server.wait_ready()
        answer = server.post("/invocations", LONG)
        assert answer.status_code == 504 and "within 0.4 s" in answer.text
        server.until(lambda: server.gauge("lmi_in_flight") == 0)


def test_sigterm_answers_what_was_accepted(tmp_path: Path) -> None:
    body = {"inputs": "ten", "parameters": LONG["parameters"] | {"max_new_tokens": 400}}
    body["parameters"]["min_new_tokens"] = 400  # type: ignore[index]
    with serving(tmp_path, "demo") as server:
        server.wait_ready()
        with ThreadPoolExecutor(8) as pool:
            tasks = [pool.submit(server.post, "/invocations", body) for _ in range(8)]
            server.until(lambda: server.gauge("lmi_in_flight") == 8)
            start = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - start < 25
            answers = [task.result(5) for task in tasks]
        assert [answer.status_code for answer in answers] == [200] * 8
        assert len({answer.text for answer in answers}) == 1


def test_sigterm_tells_those_that_are_cut(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--drain-timeout", "3") as server:
        server.wait_ready()
        with server.client.stream("POST", "/invocations", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert "shutting down" in json.loads(last)["error"]
        assert server.process.wait(10) == 0


def test_a_model_that_is_not_there_ends_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, str(tmp_path / "nothing")) as server:
        assert server.process.wait(60) == 1
    last = server.log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ") and "nothing" in last


def test_a_server_that_is_killed_takes_its_engine_along(tmp_path: Path) -> None:
    with serving(tmp_path, "demo") as server:
        server.wait_ready()
        engine = server.engine()
        server.process.kill()
        server.process.wait(10)
        psutil.wait_procs([engine], 20)
        assert not engine.is_running()


def test_a_file_of_properties_is_all_it_needs(tmp_path: Path) -> None:
    properties = tmp_path / "serving.properties"
    properties.write_text(
        "engine=FasterTransformer\noption.model_id=demo\noption.tensor_parallel_degree=1\n"
        "option.enable_streaming=true\noption.output_formatter=sse\n"
    )
    command = [sys.executable, "-m", "lmi_multi", "serve", "--properties", str(properties)]
    with serving(tmp_path, f"--properties={properties}") as server:
        server.wait_ready()
        answer = server.post("/invocations", {"inputs": "ten"})
        events = [line for line in answer.text.splitlines() if line]
        assert all(event.startswith("data: ") for event in events)
        assert json.loads(events[-1][6:])["generated_text"] == "10"
        whole = server.post("/invocations", {"inputs": "ten", "stream": False})
        assert whole.json() == {"generated_text": "10"}
    for line, message in (
        ("option.dtyp=fp32", "option.dtype"),
        ("option.multi_model=true", "option.model_id is 'demo'; allowed: none beside multi_model"),
    ):
        properties.write_text(f"option.model_id=demo\n{line}\n")
        failed = subprocess.run(command, capture_output=True, text=True)
        assert failed.returncode == 2
        assert message in failed.stderr.strip().splitlines()[-1]
