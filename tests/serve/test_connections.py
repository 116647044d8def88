"""Connections that are too many or too slow, on raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from lmi_multi.serve import connections
from tests.serve.running import serving

HEAD = b"GET /ping HTTP/1.1\r\nHost: here\r\n"
SLOW = 0.4
PATIENCE = 60.0  # what a busy machine may take
LONG = 2**23  # more than the buffers of both sides take


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    """200 to everything, after the body; `/slow` takes a second, `/long` sends `LONG` bytes."""
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/long":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a" * LONG})
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * SLOW)
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where connections wait until somebody serves them. Tests that say nothing else have time."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", PATIENCE)
    monkeypatch.setattr(connections, "READ_SECONDS", PATIENCE)
    monkeypatch.setattr(connections, "SPARE", 1)
    with socket.create_server(("127.0.0.1", 0)) as own:
        yield own


@contextlib.contextmanager
def served(listening: socket.socket) -> Iterator[None]:
    """A server with two connections."""
    config = uvicorn.Config(
        answer,
        http=connections.bounded(1),
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=int(PATIENCE),
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def address(listening: socket.socket) -> Iterator[tuple[str, int]]:
    """Where such a server is."""
    with served(listening):
        yield listening.getsockname()[:2]


@pytest.fixture
def short(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers have less than a second."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", SLOW)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    connection.settimeout(PATIENCE)
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            parts.append(part)
    return b"".join(parts)


def error(answer: bytes) -> Any:
    """The body, which is as long as the head says."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: application/json" in head
    assert f"Content-Length: {len(body)}".encode() in head.splitlines()
    return json.loads(body)


@pytest.mark.usefixtures("short")
def test_headers_that_trickle_are_given_up(address: tuple[str, int]) -> None:
    """No byte buys more time: else there would be no answer as long as they come."""
    start = time.monotonic()
    with socket.create_connection(address) as connection:
        connection.settimeout(SLOW / 10)
        answer, trickle = b"", iter(HEAD + b"x: " + b"a" * 500)
        while not answer:
            connection.sendall(bytes([next(trickle)]))
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(4096)
        assert time.monotonic() - start > SLOW * 0.9
        answer += rest(connection)
        assert b" 408 " in answer.splitlines()[0]
        assert error(answer) == {"error": f"no headers came within {SLOW:g} s", "code": 408}


@pytest.mark.usefixtures("short")
def test_silence_is_given_up(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        assert b" 408 " in rest(connection).splitlines()[0]


def test_the_next_request_of_a_connection_has_no_more_time(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert b" 200 " in connection.recv(4096).splitlines()[0]
        monkeypatch.setattr(connections, "HEAD_SECONDS", SLOW)
        connection.sendall(HEAD)  # and no more
        assert b" 408 " in rest(connection).splitlines()[0]


@pytest.mark.usefixtures("short")
def test_answers_and_bodies_may_take_longer(listening: socket.socket) -> None:
    with socket.create_connection(listening.getsockname()) as connection:
        # The headers are there before anybody waits for them.
        connection.sendall(b"POST /slow HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\na")
        with served(listening):
            time.sleep(2 * SLOW)
            connection.sendall(b"b")
            assert b" 200 " in connection.recv(4096).splitlines()[0]


def test_too_many_connections_are_told_so(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with contextlib.ExitStack() as stack:
        first, _ = (stack.enter_context(socket.create_connection(address)) for _ in range(2))
        first.sendall(HEAD + b"\r\n")
        assert b" 200 " in first.recv(4096).splitlines()[0]
        with socket.create_connection(address) as third:
            refused = rest(third)
            assert b" 503 " in refused.splitlines()[0] and b"Retry-After: 1" in refused
            said = {"error": "2 connections are open; try again later", "code": 503}
            assert error(refused) == said
        line = "a connection is refused with 503: 2 connections are open; try again later"
        assert line in caplog.messages
        # This one sends first, then reads.
        answer = httpx.get(f"http://{address[0]}:{address[1]}/ping", timeout=PATIENCE)
        assert (answer.status_code, answer.json()) == (503, said)
        assert answer.headers["retry-after"] == "1"
        first.close()
        said, deadline = b"", time.monotonic() + PATIENCE
        while b" 200 " not in said:  # until the server has seen that one is gone
            assert time.monotonic() < deadline
            with (
                socket.create_connection(address, timeout=PATIENCE) as another,
                contextlib.suppress(ConnectionError),
            ):
                another.sendall(HEAD + b"\r\n")
                said = another.recv(4096)


def asking_long(address: tuple[str, int]) -> socket.socket:
    """A connection with little room, on which much is asked for."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address)
    connection.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
    return connection


def test_a_client_that_reads_nothing_is_reset(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "a connection is reset: its client has read nothing for 0.4 s"
    monkeypatch.setattr(connections, "READ_SECONDS", SLOW)
    with asking_long(address) as connection:
        deadline = time.monotonic() + PATIENCE
        while said not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(SLOW / 10)
        assert len(rest(connection)) < LONG
    monkeypatch.setattr(connections, "READ_SECONDS", PATIENCE)
    url = f"http://{address[0]}:{address[1]}/long"
    assert len(httpx.get(url, timeout=PATIENCE).content) == LONG


def test_a_client_that_reads_slowly_is_not(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", SLOW)
    for _ in range(50):
        caplog.clear()
        with caplog.at_level(logging.WARNING), asking_long(address) as connection:
            slowly, all_of_it, pause = read_slowly(connection)
        if pause < SLOW / 2:
            break
        # Else this process was held up, and did read nothing.
    assert pause < SLOW / 2
    assert slowly < LONG / 2 and all_of_it > LONG
    assert "is reset" not in caplog.text


def read_slowly(connection: socket.socket) -> tuple[int, int, float]:
    """How many bytes come in a time in which a client must not read nothing, how many in all, and
    the longest time in which none were read."""
    start = last = time.monotonic()
    slowly = size = 0
    pause = 0.0
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**14):
            now = time.monotonic()
            pause, last, size = max(pause, now - last), now, size + len(part)
            if now - start < 3 * SLOW:
                slowly = size
                time.sleep(SLOW / 100)
    return slowly, size, pause


@pytest.mark.slow
def test_slow_headers_at_the_real_server(tmp_path: Path) -> None:
    """Beside many that are slow, others are answered."""
    with serving(tmp_path, "demo") as server, contextlib.ExitStack() as stack:
        server.wait_ready()
        where = server.client.base_url.host, server.client.base_url.port or 0
        slow = [stack.enter_context(socket.create_connection(where)) for _ in range(100)]
        for connection in slow:
            connection.sendall(HEAD)
        assert server.post("/invocations", {"inputs": "ten"}).json() == {"generated_text": "10"}
        start = time.monotonic()
        assert all(b" 408 " in rest(connection) for connection in slow)
        assert time.monotonic() - start < 3 * connections.HEAD_SECONDS
        assert server.ping() == 200
