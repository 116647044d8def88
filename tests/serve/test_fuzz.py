"""Ten thousand broken bodies: none is the server's fault, and none disturbs anybody else."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from tests.serve.running import Running, serving

BODIES = 10_000
CONNECTIONS = 4
PIPELINED = 50  # requests that are sent before their answers are read
HEALTHY = ("/invocations", b'{"inputs": "ten"}')
SEEDS: list[tuple[str, Any]] = [
    ("/invocations", {"inputs": "one", "parameters": {"max_new_tokens": 2, "top_k": 3}}),
    ("/invocations", {"inputs": [5, 6, 7], "parameters": {"stop": ["a"], "max_new_tokens": 1}}),
    ("/invocations", {"inputs": "é 漢 😀", "stream": True, "parameters": {"max_new_tokens": 2}}),
    ("/invocations", {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}),
    ("/v1/completions", {"prompt": ["one"], "max_tokens": 2, "temperature": 0, "logprobs": 1}),
    ("/v1/completions", {"prompt": "one", "max_tokens": 2, "stream": True, "logit_bias": {"5": 1}}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "é"}], "seed": 3}),
    ("/v1/embeddings", {"input": ["one", "two"], "encoding_format": "base64"}),
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -0.0, "", "\ud800", "\0", "a" * 3000),
    *([], {}, [[]], [None], [[1, 2], "a"], {"a": {"a": []}}, [-1], [2**70], ["\udfff"]),
]
PIECES = [b'"', b"\\", b"\\u00", b"\\ud800", b"[", b"{", b"}", b",", b"\xff", b"\xc3", b"\xed\xa0"]
PIECES += [b"\0", b"NaN", b"-Infinity", b"1e999", b"0" * 5000, b"\xf0\x9f\x98", b"\xef\xbb\xbf"]


def mutated(random: Random) -> tuple[str, bytes]:
    """A path, and a body in which a value, bytes, or both are not what they should be."""
    path, seed = random.choice(SEEDS)
    value = json.loads(json.dumps(seed))
    if random.random() < 0.5:
        _replace(random, value)
    data = bytearray(
        json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "replace")
    )
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        at = random.randrange(len(data) + 1)
        data[at : at + random.choice((0, 1, 3, 20))] = random.choice(
            (random.choice(PIECES), random.randbytes(random.randint(1, 4)))
        )
    return path, bytes(data)


def _replace(random: Random, value: dict[str, Any]) -> None:
    """Put a strange value in place of one of the values, or of a whole part."""
    key = random.choice([*value, "extra"])
    if isinstance(value.get(key), dict) and random.random() < 0.7:
        _replace(random, value[key])
    else:
        value[key] = random.choice(VALUES)


class Connection:
    """One kept-alive connection, on which requests follow each other without waiting."""

    def __init__(self, server: Running) -> None:
        address = server.client.base_url.host, server.client.base_url.port or 0
        self._socket = socket.create_connection(address, timeout=120)
        self._file = self._socket.makefile("rb")

    def ask(self, requests: list[tuple[str, bytes]]) -> Iterator[tuple[int, bytes]]:
        """The status and the body of the answer to each request."""
        head = "POST %s HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n"
        sent = ((head % (path, len(body))).encode() + body for path, body in requests)
        self._socket.sendall(b"".join(sent))
        for _ in requests:
            yield self._answer()

    def _answer(self) -> tuple[int, bytes]:
        status = int(self._file.readline().split()[1])
        headers = dict(line.lower().split(b": ", 1) for line in self._lines())
        if b"content-length" in headers:
            return status, self._file.read(int(headers[b"content-length"]))
        return status, b"".join(self._chunks())

    def _lines(self) -> Iterator[bytes]:
        while (line := self._file.readline().strip()) != b"":
            yield line

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._file.readline(), 16):
            yield self._file.read(size)
            self._file.readline()
        self._file.readline()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def attack(server: Running, seed: int) -> Counter[int]:
    """Send a connection's share of the bodies; how often each status came."""
    random, counts = Random(seed), Counter[int]()
    connection = Connection(server)
    for _ in range(BODIES // CONNECTIONS // PIPELINED):
        requests = [*(mutated(random) for _ in range(PIPELINED)), HEALTHY]
        for (path, body), (status, answer) in zip(requests, connection.ask(requests), strict=True):
            counts[status] += 1
            assert status in (200, 400, 404), (path, body, answer)
            if status != 200:
                error = json.loads(answer)["error"]
                assert path.startswith("/v1") == isinstance(error, dict), (path, body, answer)
                message = error["message"] if isinstance(error, dict) else error
                assert message and "\n" not in message, (path, body, answer)
                assert len(message) < 2000, (path, body[:200], message[:200])
        assert answer == b'{"generated_text":"10"}'
    connection.close()
    return counts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("fuzz")
    with serving(place, "demo", "--max-batch", "8", OPTION_MAX_BODY_BYTES="65536") as running:
        running.wait_ready()
        yield running


def test_broken_bodies(server: Running) -> None:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        counts = sum(pool.map(lambda seed: attack(server, seed), range(CONNECTIONS)), Counter())
    assert counts.total() >= BODIES
    assert counts[200] > BODIES // 50 and counts[400] > BODIES // 2
    assert server.gauge("lmi_in_flight") == 0 and server.gauge("lmi_engine_restarts") == 0
    assert "Traceback" not in server.log.read_text()


def test_bodies_that_are_too_large(server: Running) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = server.client.post("/invocations", content=parts())
    assert answer.status_code == 413
    assert answer.json() == {"error": "the body is larger than 65536 bytes", "code": 413}
    whole = server.client.post("/v1/completions", content=b" " * 65537)
    assert whole.status_code == 413 and whole.json()["error"]["code"] == 413
    with server.asking("/invocations", {}) as connection:  # its rest never comes
        connection.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: here\r\nContent-Length: 999999999999\r\n\r\n"
        )
        received = b""
        while b" 413 " not in received:
            part = connection.recv(4096)
            assert part, received
            received += part
    assert server.post("/invocations", {"inputs": " " * 60000}).status_code == 400
    assert server.post("/invocations", {"inputs": "ten"}).status_code == 200
