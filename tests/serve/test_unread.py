"""Streams whose clients do not read: what waits for them is bounded, and their places are free."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmi_multi.completion import TokenLogprob
from lmi_multi.serve.failures import LateError, UnreadError
from lmi_multi.serve.inbox import MAX_SCRIPT_UNREAD, MAX_UNREAD, Inbox, size_of
from lmi_multi.streaming import Chunk
from tests.serve.running import Running, serving

# Every token comes with those of 20 others: about 40 KB a step.
MUCH: dict[str, Any] = {"prompt": ["ten"] * 16, "max_tokens": 1900, "logprobs": 20, "stream": True}
MUCH |= {"ignore_eos": True, "min_new_tokens": 1900}


def asked(server: Running, path: str, body: Any) -> socket.socket:
    """A connection with little room, on which a request was sent and nothing is read."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(120)
    connection.connect((server.client.base_url.host, server.client.base_url.port or 0))
    connection.sendall(head.encode() + data)
    return connection


def cut(server: Running) -> list[tuple[int, int]]:
    """The steps at which requests were cut, and the bytes that they had left unread."""
    found = re.findall(
        r"a request is cut at step (\d+): its client leaves more than (\d+) bytes unread",
        server.log.read_text(),
    )
    return [(int(step), int(size)) for step, size in found]


def test_a_client_that_does_not_read_is_cut(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--max-batch", "16") as server:
        server.wait_ready()
        own = psutil.Process(server.process.pid)
        before = own.memory_info().rss
        with asked(server, "/v1/completions", MUCH) as connection:
            server.until(lambda: cut(server))
            server.until(lambda: server.gauge("lmi_batch_rows") == 0)
            [(step, size)] = cut(server)
            assert size == MAX_UNREAD and server.gauge("lmi_in_flight") == 0
            # Nobody else asks anything, so the engine stands still since it has let go. It may be
            # some steps ahead of a server that is busy.
            steps = server.gauge("lmi_engine_steps")
            assert step <= steps < 1000, "long before the answer is whole"
            assert own.memory_info().rss - before < 10 * MAX_UNREAD
            assert server.post("/invocations", {"inputs": "ten"}).json() == {"generated_text": "10"}
            said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        last = said.rstrip(b"\r\n0").splitlines()[-1]
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["message"] == "the client reads more slowly than the server may wait for"
        assert server.gauge('lmi_requests_total{outcome="failed"}') == 16
        assert "Traceback" not in server.log.read_text()


def test_a_script_s_client_that_does_not_read_is_cut(tmp_path: Path) -> None:
    script = tmp_path / "model.py"
    script.write_text(
        "from djl_python import Output\n"
        "def handle(inputs):\n"
        "    if inputs.is_empty():\n"
        "        return None\n"
        "    if inputs.get_as_string() == 'short':\n"
        "        return Output().add('whole')\n"
        "    return Output().add_stream_content(({'a': 'b' * 2**20} for _ in range(10**9)))\n"
    )
    with serving(tmp_path, "demo", "--entry-point", str(script)) as server:
        server.wait_ready()
        with asked(server, "/invocations", "long") as connection:
            server.until(lambda: cut(server))
            [(_, size)] = cut(server)
            assert size == MAX_SCRIPT_UNREAD
            answer = server.client.post("/invocations", content="short")  # it has got its turn
            assert answer.text == "whole"
            said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert b'{"error": "the client reads more slowly than the server may wait for"' in said


def test_an_inbox() -> None:
    async def main() -> None:
        inbox = Inbox(100)
        inbox.put("a", 60)
        inbox.put("b", 60)
        assert inbox.is_full
        assert await inbox.next() == "a" and not inbox.is_full
        inbox.put("c", 60)
        inbox.fail(UnreadError("slow"))
        assert not inbox.is_full
        with pytest.raises(UnreadError):
            await inbox.next()
        with inbox.within(0.01), pytest.raises(LateError, match=r"within 0.01 s"):
            await inbox.next()
        whole = Inbox()  # for those whose pace is not their client's
        whole.put("a", 2**40)
        assert not whole.is_full

    asyncio.run(main())


def test_sizes_grow_with_tokens_and_logprobs() -> None:
    plain = Chunk(0, None, [1, 2], None)
    told = Chunk(
        0, None, [1, 2], None, logprobs=[TokenLogprob(1, -1.0, dict.fromkeys(range(20), -1.0))]
    )
    assert size_of([]) == 0 < size_of([plain]) < size_of([told]) < size_of([told, plain])
