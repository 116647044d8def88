"""Bodies within the limit that would cost much more than they say, were they looked at in full."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lmi_multi.serve import body
from lmi_multi.serve.app import BODY_BYTES
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.lmi import Invocation
from tests.serve.running import Running, serving

SIZE = 5 * 2**20
SECONDS, BYTES = 5.0, 500 * 2**20
"""What one may take: it is about 1 s of the processor, and 250 MiB. Looked at in full each of them
takes a minute, or gigabytes, or both."""


def filled(head: str, entry: Callable[[int], str], tail: str) -> bytes:
    """A body of about `SIZE` bytes with as many entries as go in."""
    size = len(entry(10**6)) + 1
    return (head + ",".join(map(entry, range(SIZE // size))) + tail).encode()


def names(number: int) -> str:
    return f'"{number:x}":0'


BODIES = {
    "a-name-twice": ("/invocations", filled("{", names, ',"0":1,"inputs":"a"}')),
    "the-last-name-twice": ("/invocations", filled('{"inputs":"a",', names, ',"x":1,"x":1}')),
    "unknown-fields": ("/invocations", filled('{"inputs":"a",', names, "}")),
    "unknown-parameters": ("/invocations", filled('{"inputs":"a","parameters":{', names, "}}")),
    "unknown-further-down": (
        "/v1/completions",
        filled('{"prompt":"a","stream":true,"stream_options":{', names, "}}"),
    ),
    "ids-and-a-string": ("/invocations", filled('{"inputs":[', lambda _: "1", ',"a"]}')),
    "lists-of-no-ids": ("/v1/completions", filled('{"prompt":[', lambda _: '[""]', "]}")),
    "ids": ("/v1/embeddings", filled('{"input":[', lambda _: "1", "]}")),
    "no-messages": ("/v1/chat/completions", filled('{"messages":[', lambda _: "1", "]}")),
    "stop-strings": (
        "/invocations",
        filled('{"inputs":"a","parameters":{"stop":[', lambda _: '"x"', "]}}"),
    ),
    "a-long-name": (
        "/invocations",
        filled('{"inputs":"a","parameters":{"', lambda _: "x", '":1}}'),
    ),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("costly"), "demo") as running:
        running.wait_ready()
        yield running


def worked(process: psutil.Process) -> float:
    """Seconds of the processor that it has had, which others' work does not add to."""
    times = process.cpu_times()
    return float(times.user + times.system)


def peak(server: Running) -> int:
    """The most memory that the server ever took."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    [kibibytes] = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(kibibytes) * 1024


@pytest.mark.parametrize("name", BODIES)
def test_what_is_wrong_costs_little(name: str, server: Running) -> None:
    path, content = BODIES[name]
    process = psutil.Process(server.process.pid)
    before, start = process.memory_info().rss, worked(process)
    answer = server.client.post(path, content=content)
    assert answer.status_code == 400 and len(answer.content) < 2000
    assert worked(process) - start < SECONDS
    assert peak(server) - before < BYTES
    assert server.post("/invocations", {"inputs": "ten"}).status_code == 200


def test_bodies_of_all_requests_are_bounded(server: Running) -> None:
    """Those that come, and do not end: no more of them are kept than `BODY_BYTES`."""
    limit = 6 * 2**20
    address = server.client.base_url.host, server.client.base_url.port or 0
    head = f"POST /invocations HTTP/1.1\r\nHost: here\r\nContent-Length: {limit}\r\n\r\n".encode()
    shed = server.gauge("lmi_shed_requests_total")
    with contextlib.ExitStack() as stack:
        open_ = []
        for _ in range(BODY_BYTES // limit + 3):
            connection = stack.enter_context(socket.create_connection(address, timeout=120))
            with contextlib.suppress(ConnectionError):  # it is told so in the midst of it
                connection.sendall(head + b" " * (limit - 1))
            open_.append(connection)
        server.until(lambda: server.gauge("lmi_shed_requests_total") >= shed + 3)
        said = bytearray()
        server.until(lambda: said.extend(b"".join(map(told, open_))) or b"take too much" in said)
        assert b" 503 " in said and b"retry-after: 1" in said
        assert server.ping() == 200
    server.until(lambda: server.post("/invocations", {"inputs": "a" * 2**20}).status_code == 400)
    assert server.post("/invocations", {"inputs": "ten"}).json() == {"generated_text": "10"}


def told(connection: socket.socket) -> bytes:
    """What has been answered already."""
    connection.setblocking(False)
    try:
        return connection.recv(4096)
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": "a", "x": 1}, "unknown field 'x'; known: inputs, parameters, stream"),
        ({"inputs": [1, "a"]}, "inputs is [1, 'a']; allowed: a string, a list of strings, a list"),
        ({"inputs": [True]}, "inputs is [True]; allowed: a string"),
        ({"inputs": [[1], [1.0]]}, "inputs is [[1], [1.0]]; allowed: a string"),
        ({"inputs": None}, "inputs is None; allowed: a string"),
        ({"inputs": "a", "parameters": []}, "parameters is []: Input should be a valid dictionary"),
        ({"parameters": {}}, "inputs: Field required"),
    ],
)
def test_the_first_fault_is_told(given: object, message: str) -> None:
    with pytest.raises(HttpError) as raised:
        body.check(Invocation, given)
    assert raised.value.status == 400 and raised.value.message.startswith(message)
    assert raised.value.param in json.dumps(given) + "inputs"


@pytest.mark.parametrize("inputs", ["a", [], ["a", "b"], [1, 2], [[1], [2, 3]], [[]]])
def test_what_prompts_look_like(inputs: object) -> None:
    assert body.check(Invocation, {"inputs": inputs}).inputs == inputs


def test_what_the_page_says_of_prompts() -> None:
    field = Invocation.model_json_schema()["properties"]["inputs"]
    assert len(field["anyOf"]) == 4 and field["description"].startswith("a string, a list")
