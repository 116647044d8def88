"""What goes wrong around a server that runs: clients that leave, overload, signals."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lmi_multi.serve import server as serve_server
from lmi_multi.serve.app import Application
from lmi_multi.serve.server import LAST_WORDS, Server
from lmi_multi.serve.settings import ServeSettings
from tests.serve.running import LONG, ROOM, Running, serving, silent_collector


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("faults"), "demo", "--max-batch=2", ROOM) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def server(shared: Running) -> Running:
    """The server with nothing to do: the engine tells of its rows a step late."""
    shared.until(lambda: shared.gauge("lmi_in_flight") == shared.gauge("lmi_batch_rows") == 0)
    return shared


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
    with server.asking("/invocations", LONG):
        server.until(lambda: server.gauge("lmi_in_flight") == 1)
    server.until(lambda: server.gauge("lmi_in_flight") == 0)
    server.until(lambda: server.gauge(aborted) == before + 1)


@pytest.mark.parametrize("path", ["/invocations", "/v1/completions"])
def test_a_client_that_leaves_while_it_waits_frees_its_place(server: Running, path: str) -> None:
    with server.asking("/invocations", LONG), server.asking("/invocations", LONG):
        server.until(lambda: server.gauge("lmi_batch_rows") == 2)
        waiting = {"prompt": "ten"} if path == "/v1/completions" else {"inputs": "ten"}
        with server.asking(path, waiting | {"stream": True}):
            server.until(lambda: server.gauge("lmi_queue") == 1)
        server.until(lambda: server.gauge("lmi_in_flight") == 2)
        assert server.gauge("lmi_batch_rows") == 2
    server.until(lambda: server.gauge("lmi_in_flight") == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_place_is_free_within_two_steps(server: Running, stream: bool) -> None:
    engine = server.engine()
    with server.asking("/invocations", LONG | {"stream": stream}) as connection:
        server.until(lambda: server.gauge("lmi_batch_rows") == 1)
        if stream:
            assert connection.recv(1)
        engine.suspend()  # so that the steps from here on can be counted
    try:
        server.until(lambda: server.gauge("lmi_in_flight") == 0)
        before = told_steps(server)
    finally:
        engine.resume()
    server.until(lambda: server.gauge("lmi_batch_rows") == 0)
    assert 0 < before <= server.gauge("lmi_engine_steps") <= before + 2


def told_steps(server: Running) -> float:
    """The steps of an engine that stands still, once the server has heard of all of them."""
    before = -1.0
    while before != (before := server.gauge("lmi_engine_steps")):
        time.sleep(0.5)
    return before


def test_a_full_queue_is_refused(tmp_path: Path) -> None:
    # A prompt's bytes count before it is tokenized: 400 are about 100 tokens.
    options = ("--max-queue=2", ROOM)
    with serving(tmp_path, "demo", *options, OPTION_MAX_QUEUE_TOKENS="100") as server:
        server.wait_ready()
        many = server.post("/invocations", {"inputs": ["ten"] * 3})
        assert many.status_code == 400 and "3 prompts are given; allowed: 1 to 2" in many.text
        with server.asking("/invocations", LONG):
            server.until(lambda: server.gauge("lmi_in_flight") == 1)
            for inputs in ("a" * 400, ["ten", "ten"]):
                answer = server.post("/invocations", {"inputs": inputs})
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            with server.asking("/invocations", LONG):
                server.until(lambda: server.gauge("lmi_in_flight") == 2)
                answer = server.post("/v1/completions", {"prompt": "ten"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert "2 requests are being answered" in answer.json()["error"]["message"]
        assert server.gauge("lmi_shed_requests_total") == 3
        server.until(lambda: server.gauge("lmi_in_flight") == 0)
        assert server.post("/invocations", {"inputs": "a" * 100}).status_code == 200


def test_sigterm_under_load(tmp_path: Path) -> None:
    fixed = {"max_new_tokens": 100, "min_new_tokens": 100, "ignore_eos": True}
    body = {"inputs": "ten", "parameters": fixed}

    def whole() -> str:
        answer = server.post("/invocations", body)
        assert answer.status_code == 200
        return str(answer.json()["generated_text"])

    def streamed() -> str:
        with server.client.stream("POST", "/invocations", json=body | {"stream": True}) as answer:
            lines = [json.loads(line) for line in answer.iter_lines() if line]
        assert len(lines) == 100
        return str(lines[-1]["generated_text"])

    def refused() -> bool:
        try:
            with server.asking("/invocations", {"inputs": "ten"}) as connection:
                head = connection.recv(1000)
        except ConnectionError:
            return True
        assert head.startswith(b"HTTP/1.1 503") or not head
        assert not head or b"retry-after" in head.lower()
        return True

    with serving(tmp_path, "demo", "--max-batch", "4") as server:
        server.wait_ready()
        with ThreadPoolExecutor(24) as pool:
            with server.standing():  # so that none is answered before all of them are there
                tasks = [pool.submit(ask) for ask in [whole, streamed] * 12]
                server.until(lambda: server.gauge("lmi_in_flight") == 24)
                start = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                server.until(lambda: server.ping() != 200)
                assert refused()
            assert server.process.wait(40) == 0
            assert time.monotonic() - start < 25
            assert len({task.result(30) for task in tasks}) == 1


def test_sigterm_tells_those_that_are_cut(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--drain-timeout=12", ROOM) as server:
        server.wait_ready()
        with server.client.stream("POST", "/invocations", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert "shutting down" in json.loads(last)["error"]
        assert server.process.wait(60) == 0


def test_clients_are_told_before_they_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a loop that was held up until it was time for both."""
    settings = ServeSettings(model="demo", drain_timeout=0.8)
    server = Server(Application(settings, "demo", lambda _: settings), settings)
    done: list[tuple[str, float]] = []
    monkeypatch.setattr(serve_server, "_leave", lambda: None)
    monkeypatch.setattr(
        server._application, "cut", lambda reason: done.append((reason, time.monotonic()))
    )
    monkeypatch.setattr(server, "_reset", lambda: done.append(("reset", time.monotonic())))

    async def end() -> None:
        server._end()
        time.sleep(1)
        while len(done) < 2:
            await asyncio.sleep(0.01)

    asyncio.run(end())
    [(first, told), (second, reset)] = done
    assert (first, second) == ("the server is shutting down", "reset")
    assert reset - told > 0.09  # a part of the drain: 0.1 s


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


def begun(server: Running, path: str = "/v1/completions") -> socket.socket:
    """A connection on which only half of a body has come, whose rest the server waits for."""
    address = server.client.base_url.host, server.client.base_url.port or 0
    connection = socket.create_connection(address, timeout=120)
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n"
    connection.sendall(head.encode() + b'Expect: 100-continue\r\n\r\n{"prompt": ')
    said = b""
    while not said.endswith(b"\r\n\r\n"):
        said += connection.recv(1)
    assert said.startswith(b"HTTP/1.1 100 ")
    return connection


def everything(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_half_a_body_does_not_hold_the_server(number: signal.Signals, tmp_path: Path) -> None:
    with serving(tmp_path, "demo") as server:
        server.wait_ready()
        with begun(server) as openai, begun(server, "/invocations") as plain:
            start = time.monotonic()
            server.process.send_signal(number)
            answers = [everything(openai), everything(plain)]
            assert server.process.wait(60) == 0
            assert time.monotonic() - start < 15  # they would be cut after 19
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") and b"connection: close" in head.lower()
        assert b"retry-after" in head.lower() and b"application/json" in head.lower()
        assert "the server is shutting down" in str(json.loads(body)["error"])
    assert json.loads(answers[0].partition(b"\r\n\r\n")[2])["error"]["type"] == "server_error"
    assert "Traceback" not in server.log.read_text()


def stands_still(server: Running) -> bool:
    """Whether no more is taken from the engine, as the client does not take it either."""
    before = server.gauge("lmi_generated_tokens_total")
    time.sleep(2)
    return server.gauge("lmi_generated_tokens_total") == before


def test_a_client_that_does_not_read_does_not_hold_the_server(tmp_path: Path) -> None:
    # More than the buffers of both sides take: every token comes with those of 20 others.
    body = {"prompt": ["ten"] * 16, "max_tokens": 1900, "logprobs": 20, "stream": True}
    body |= {"ignore_eos": True, "min_new_tokens": 1900}
    with serving(tmp_path, "demo", "--drain-timeout=12") as server:
        server.wait_ready()
        address = server.client.base_url.host, server.client.base_url.port or 0
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address)
            connection.sendall(head.encode() + data)
            server.until(lambda: server.gauge("lmi_generated_tokens_total") > 0)
            server.until(lambda: stands_still(server))
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
            # Its part of 12 s takes 7.5; nobody would reset the connection for 30.
            assert time.monotonic() - start < 25
    log = server.log.read_text()
    assert "Traceback" not in log and "1 connections are reset" in log


def test_what_does_not_end_in_time_is_left(tmp_path: Path) -> None:
    """A collector of traces that takes them and never answers: waiting for it is nobody's due."""
    pytest.importorskip("opentelemetry.sdk")
    with (
        silent_collector(60) as endpoint,
        serving(tmp_path, "demo", "--drain-timeout", "4", **endpoint) as server,
    ):
        server.wait_ready()
        assert server.post("/invocations", {"inputs": "ten"}).status_code == 200
        engine = server.engine()
        start = time.monotonic()
        assert server.stop() == 0
        assert 3 < time.monotonic() - start < 25  # it is left after 3.5, or takes 60
        engine.wait(60)  # it has noticed
    assert "its time is up" in server.log.read_text()


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
def test_draining_is_told_in_the_route_s_form(path: str) -> None:
    settings = ServeSettings(model="demo")
    application = Application(settings, "demo", lambda _: settings)
    application.drain()
    answer = TestClient(application.app).post(path, json={})
    assert answer.status_code == 503 and answer.headers["connection"] == "close"
    error = answer.json()["error"]
    message = error["message"] if path.startswith("/v1/") else error
    assert message == "the server is shutting down"


def test_the_default_drain_adds_up() -> None:
    """Within 25 s, as SageMaker kills after 30: uvicorn waits for less, and the cut is before."""
    settings = ServeSettings(model="demo")
    server = Server(Application(settings, "demo", lambda _: settings), settings)
    waits = server.config.timeout_graceful_shutdown
    assert waits is not None and settings.drain_timeout - LAST_WORDS < waits <= 22
