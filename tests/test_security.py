"""What docs/security.md promises of a server, as a black box where that is possible."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

import lmi_multi
from lmi_multi.errors import CheckpointError
from lmi_multi.serve import app, body
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.settings import ServeSettings
from tests.checkpoint.tiny import LLAMA, llama_state, write
from tests.serve.running import Running, serving
from tests.test_ranks import rank_processes

ROOT = Path(__file__).parent.parent
KEY = "correct-horse-battery-staple"
OPEN = {"authorization": f"Bearer {KEY}"}
LIMIT = 4096
# Minutes of work, if nobody ends it.
LONG = {"max_new_tokens": 1900, "min_new_tokens": 1900, "ignore_eos": True, "num_beams": 16}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a key and narrow limits."""
    with serving(
        tmp_path_factory.mktemp("security"),
        "demo",
        *("--max-queue", "4", "--request-timeout", "12"),
        LMI_MULTI_API_KEY=KEY,
        OPTION_MAX_BODY_BYTES=str(LIMIT),
    ) as running:
        running.wait_ready()
        yield running


def post(server: Running, path: str, value: Any, **headers: str) -> httpx.Response:
    return server.client.post(path, json=value, headers=OPEN | headers)


def raw(server: Running, sent: bytes) -> str:
    """The status line that answers these bytes."""
    address = server.client.base_url.host, server.client.base_url.port or 0
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(sent)
        return connection.makefile("rb").readline().decode().strip()


# Who may come in


def test_it_listens_on_loopback_alone(server: Running) -> None:
    own = psutil.Process(server.process.pid)
    sockets = [c for p in (own, *own.children(recursive=True)) for c in p.net_connections("inet")]
    listening = {(c.laddr.ip, c.laddr.port) for c in sockets if c.status == psutil.CONN_LISTEN}
    assert listening == {("127.0.0.1", server.client.base_url.port)}


def test_ranks_talk_over_loopback(tmp_path: Path) -> None:
    with lmi_multi.load("demo", backend="cpu", tensor_parallel=2):
        ranks = rank_processes()
        listening = [c.laddr.ip for p in ranks for c in p.net_connections("inet")]
    assert listening and set(listening) == {"127.0.0.1"}


def test_every_route_but_ping_asks_for_the_key(server: Running) -> None:
    described = server.client.get("/openapi.json", headers=OPEN).json()["paths"]
    routes = [(m.upper(), path) for path, methods in described.items() for m in methods]
    routes += [("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/nothing", "/")]
    routes += [(method, "/ping/") for method in ("GET", "POST")] + [("GET", "/PING")]
    assert ("POST", "/invocations") in routes and ("GET", "/metrics") in routes
    for method, path in routes:
        if path == "/ping":
            continue
        for given in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}):
            answer = server.client.request(method, path, headers=given)
            assert (answer.status_code, answer.headers.get("www-authenticate")) == (401, "Bearer")
    assert server.client.get("/ping").status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}\x00",
        "Bearer é",
    ],
)
def test_wrong_keys(server: Running, given: str) -> None:
    def status(given: str) -> str:
        sent = f"GET /metrics HTTP/1.1\r\nHost: here\r\nAuthorization: {given}\r\n\r\n"
        return raw(server, sent.encode("latin-1")).split()[1]

    assert status(given) in ("401", "400")  # a header with a NUL is no HTTP
    assert status(f"bearer {KEY}") == "200"


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return False

    monkeypatch.setattr(app.hmac, "compare_digest", compare)

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("let in")

    async def receive() -> Message:
        raise AssertionError("nothing is read of an unknown client")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "path": "/metrics", "method": "GET", "headers": headers}
    asyncio.run(app._Authorized(never, KEY)(scope, receive, send))
    assert compared == [(KEY.encode(), KEY.encode())]  # and nothing else decides
    assert sent[0]["status"] == 401


# What a request may do


def test_no_request_names_a_file(server: Running) -> None:
    for value in ("/etc/passwd", "../../etc/passwd", "s3://bucket/model", "gpt2"):
        answer = post(server, "/v1/completions", {"model": value, "prompt": "a"})
        assert answer.status_code == 404 and "allowed: 'demo'" in answer.text
        for field in ("model", "model_id", "adapter", "chat_template"):
            assert post(server, "/invocations", {"inputs": "a", field: value}).status_code == 400
            given = {"inputs": "a", "parameters": {field: value}}
            assert post(server, "/invocations", given).status_code == 400
    for path in ("/../etc/passwd", "/%2e%2e/etc/passwd", "/docs/../../etc/passwd", "//etc/passwd"):
        request = f"GET {path} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n\r\n"
        assert raw(server, request.encode()).split()[1] == "404"


@pytest.mark.parametrize(
    "parameters",
    [
        {"num_return_sequences": 17},
        {"num_beams": 17},
        {"stop": ["x"] * 17},
        {"stop": "x" * 1025},
        {"logprobs": 21},
        {"bad_words": ["x"] * 1025},
        {"stop_token_ids": [1] * 4097},
        {"logit_bias": {str(n): 1 for n in range(4097)}},
        {"max_new_tokens": 10**6},
    ],
    ids=lambda parameters: next(iter(parameters)),
)
def test_fan_out_is_capped(demo_server: Running, parameters: dict[str, Any]) -> None:
    answer = demo_server.post("/invocations", {"inputs": "a", "parameters": parameters})
    assert answer.status_code == 400 and next(iter(parameters)) in answer.text


def test_prompts_of_one_request_are_capped(server: Running) -> None:
    for path, field in (("/invocations", "inputs"), ("/v1/completions", "prompt")):
        assert post(server, path, {field: ["ten"] * 4}).status_code == 200
        assert post(server, path, {field: ["ten"] * 5}).status_code in (400, 503)
    assert post(server, "/invocations", {"inputs": "ten"}).status_code == 200


def test_bodies_are_capped(server: Running) -> None:
    head = f"POST /invocations HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n"
    announced = f"{head}Content-Length: {LIMIT + 1}\r\n\r\n"  # nothing of it is waited for
    assert raw(server, announced.encode()).split()[1] == "413"
    chunk = f"{LIMIT + 1:x}\r\n{'x' * (LIMIT + 1)}\r\n"  # and there is no end
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n{chunk}"
    assert raw(server, chunked.encode()).split()[1] == "413"
    endless = f"{head}X: {'x' * 2**20}"
    assert raw(server, endless.encode()).split()[1] in ("400", "431")
    whole = json.dumps({"inputs": "ten"}).ljust(LIMIT)
    answer = server.client.post("/invocations", content=whole, headers=OPEN)
    assert answer.status_code == 200


def test_a_body_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Message:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    monkeypatch.setattr(body, "PATIENCE", 0.05)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(HttpError) as error:
        asyncio.run(body.read(Request(scope, receive), LIMIT))
    assert error.value.status == 408 and not parts


def test_a_request_has_its_time(server: Running) -> None:
    answer = post(server, "/invocations", {"inputs": ["ten"] * 4, "parameters": LONG})
    assert answer.status_code == 504 and "within 12 s" in answer.text
    server.until(lambda: "lmi_in_flight 0.0" in server.client.get("/metrics", headers=OPEN).text)


# What is told


def test_neither_prompts_nor_keys_are_logged(server: Running) -> None:
    secret = "the moon is made of cheese"
    assert post(server, "/invocations", {"inputs": secret}).status_code == 200
    assert post(server, "/invocations", {"inputs": secret, "other": secret}).status_code == 400
    server.client.get("/metrics", headers={"authorization": "Bearer a-wrong-key"})
    said = server.log.read_text()
    assert "Application startup complete" in said
    assert not [word for word in (secret, KEY, "a-wrong-key") if word in said]
    commands = [p.cmdline() for p in (psutil.Process(server.process.pid), server.engine())]
    assert KEY not in json.dumps(commands)


def test_errors_of_ours_say_nothing_of_the_inside(tmp_path: Path) -> None:
    application = app.Application(ServeSettings(model="demo"), "demo", lambda _: ServeSettings())

    def fail() -> bytes:
        raise RuntimeError(f"the secret is in {tmp_path}")

    application.metrics.text = fail  # type: ignore[method-assign, assignment]
    answer = TestClient(application.app, raise_server_exceptions=False).get("/metrics")
    assert answer.status_code == 500
    assert answer.json() == {"error": "something went wrong here; the log says what", "code": 500}


# What a model may do


class Evil:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch was_here",)


def test_pickles_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "model", llama_state())
    (folder / "model.safetensors").unlink()
    torch.save(llama_state() | {"evil": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a readable PyTorch file of tensors"):
        lmi_multi.load(folder, backend="cpu")
    assert not (tmp_path / "was_here").exists()


def test_code_beside_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import pathlib; pathlib.Path('was_here').touch()"
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    config = LLAMA | {"auto_map": {name: f"evil.{name}" for name in classes}}
    folder = write(tmp_path / "model", llama_state(), config)
    for name in ("evil.py", "model.py", "modeling_llama.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    with lmi_multi.load(folder, backend="cpu") as model:
        assert len(model.generate([[1, 2]], max_new_tokens=2, ignore_eos=True)[0].token_ids) == 2
    assert not (tmp_path / "was_here").exists()


# The document


def test_the_document_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
    ours = re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE)
    missing = set(ours) - {name for _, name in named} - {"test_the_document_names_tests_that_exist"}
    assert not missing, "tests of promises that are not made"
