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
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A server with two connections, which waits for headers for less than a second."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", SLOW)
    monkeypatch.setattr(connections, "READ_SECONDS", SLOW)
    monkeypatch.setattr(connections, "SPARE", 1)
    protocol = connections.bounded(1)
    config = uvicorn.Config(answer, http=protocol, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield listening.getsockname()[:2]
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    connection.settimeout(20)
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


def test_headers_that_trickle_are_given_up(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        start = time.monotonic()
        for byte in HEAD[:8]:  # none of them buys more time
            connection.sendall(bytes([byte]))
            time.sleep(SLOW / 10)
        answer = rest(connection)
        assert b" 408 " in answer.splitlines()[0]
        assert error(answer) == {"error": f"no headers came within {SLOW:g} s", "code": 408}
        assert SLOW * 0.9 < time.monotonic() - start < SLOW * 10


def test_silence_is_given_up(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        assert b" 408 " in rest(connection).splitlines()[0]


def test_the_next_request_of_a_connection_has_no_more_time(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(HEAD + b"\r\n")
        assert b" 200 " in connection.recv(4096).splitlines()[0]
        connection.sendall(HEAD)  # and no more
        assert b" 408 " in rest(connection).splitlines()[0]


def test_answers_and_bodies_may_take_longer(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"POST /slow HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\na")
        time.sleep(1.5 * SLOW)
        connection.sendall(b"b")
        assert b" 200 " in connection.recv(4096).splitlines()[0]


def test_too_many_connections_are_told_so(address: tuple[str, int]) -> None:
    with contextlib.ExitStack() as stack:
        first, _ = (stack.enter_context(socket.create_connection(address)) for _ in range(2))
        first.sendall(HEAD + b"\r\n")
        assert b" 200 " in first.recv(4096).splitlines()[0]
        with socket.create_connection(address) as third:
            refused = rest(third)
            assert b" 503 " in refused.splitlines()[0] and b"Retry-After: 1" in refused
            said = {"error": "2 connections are open; try again later", "code": 503}
            assert error(refused) == said
        answer = httpx.get(
            f"http://{address[0]}:{address[1]}/ping"
        )  # which sends first, then reads
        assert (answer.status_code, answer.json()) == (503, said)
        assert answer.headers["retry-after"] == "1"
        first.close()
        while True:  # until the server has seen that one is gone
            with (
                socket.create_connection(address) as another,
                contextlib.suppress(ConnectionError),
            ):
                another.sendall(HEAD + b"\r\n")
                if b" 200 " in another.recv(4096):
                    return


def asking_long(address: tuple[str, int]) -> socket.socket:
    """A connection with little room, on which much is asked for."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address)
    connection.sendall(b"GET /long HTTP/1.1\r\nHost: here\r\n\r\n")
    return connection


def test_a_client_that_reads_nothing_is_reset(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with asking_long(address) as connection:
        time.sleep(3 * SLOW)
        assert len(rest(connection)) < LONG
    assert "a connection is reset: its client has read nothing for 0.4 s" in caplog.text
    assert len(httpx.get(f"http://{address[0]}:{address[1]}/long").content) == LONG


def test_a_client_that_reads_slowly_is_not(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), asking_long(address) as connection:
        start, taken = time.monotonic(), 0
        while time.monotonic() - start < 3 * SLOW:
            taken += len(connection.recv(2**14))
            time.sleep(SLOW / 100)
        assert taken < LONG / 2
        assert len(rest(connection)) + taken > LONG
    assert "is reset" not in caplog.text


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
