"""A line for each request, as a black box: what is in it, and what never is."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.running import LONG, ROOM, Running, serving
from tests.tiny_models import checkpoint

SECRET = "the moon is made of cheese"
KEY = "correct-horse-battery-staple"
OPEN = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("requests")
    options = ("--log-format=json", "--request-timeout=6", "--max-batch=2", ROOM)
    with serving(place, "demo", *options, LMI_MULTI_API_KEY=KEY) as running:
        running.client.headers = OPEN
        running.wait_ready()
        yield running


def lines(server: Running) -> list[dict[str, Any]]:
    """All that were logged for requests."""
    whole, _, _ = server.log.read_text().rpartition("\n")  # the last one may still be written
    said = [json.loads(line) for line in whole.splitlines() if line[:1] == "{"]
    return [line for line in said if line["logger"] == "lmi_multi.serve.request_log"]


def line(server: Running, own: str) -> dict[str, Any]:
    """The one of the request with this id, without what every record has."""
    server.until(lambda: [entry for entry in lines(server) if entry["id"] == own])
    [found] = [entry for entry in lines(server) if entry["id"] == own]
    assert found.pop("message") == "request" and found.pop("process") == server.process.pid
    return {name: found[name] for name in found if name not in ("time", "logger", "id")}


def named(own: str) -> dict[str, str]:
    return {"x-request-id": own}


def test_a_whole_answer(server: Running) -> None:
    start = time.monotonic()
    answer = server.post("/invocations", {"inputs": ["ten", "two"]}, headers=named("a.1"))
    assert answer.headers["x-request-id"] == "a.1"
    found = line(server, "a.1")  # which is written after the answer
    took = time.monotonic() - start
    assert 0 < found.pop("first_token_seconds") <= found.pop("seconds") <= took
    prompts = found.pop("prompt_tokens")
    assert found == {
        "level": "INFO",
        "method": "POST",
        "route": "/invocations",
        "status": 200,
        "output_tokens": 5,
        "finish_reasons": "eos",
    }
    usage = server.post("/v1/completions", {"prompt": ["ten", "two"]}).json()["usage"]
    assert prompts == usage["prompt_tokens"]


def test_a_stream(server: Running) -> None:
    body = {"prompt": "ten", "stream": True, "max_tokens": 1, "temperature": 0}
    answer = server.post("/v1/completions", body, headers=named("b"))
    assert answer.headers["x-request-id"] == "b" and answer.text.endswith("data: [DONE]\n\n")
    found = line(server, "b")
    assert (found["route"], found["status"], found["output_tokens"]) == ("/v1/completions", 200, 1)
    assert found["finish_reasons"] == "length" and "error" not in found


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "route", "error"),
    [
        ("POST", "/invocations", {"inputs": SECRET, "other": SECRET}, 400, "/invocations", None),
        ("POST", "/v1/completions", {"prompt": SECRET, "n": 99}, 400, "/v1/completions", None),
        ("GET", f"/{SECRET}?key={KEY}", None, 404, None, "not_found"),
        ("GET", f"/v1/models/{SECRET}", None, 404, "/v1/models/{model:path}", "not_found"),
        ("GET", "/invocations", None, 405, "/invocations", "not_found"),
        ("POST", "/invocations", LONG, 504, "/invocations", "late"),
    ],
)
def test_what_goes_wrong(
    server: Running, method: str, path: str, body: Any, status: int, route: Any, error: Any
) -> None:
    own = f"wrong-{path.split('/')[1].split('?')[0]}-{status}".replace(" ", "")
    answer = server.client.request(method, path, json=body, headers=named(own))
    assert answer.status_code == status and answer.headers["x-request-id"] == own
    found = line(server, own)
    assert found["error"] == (error or "bad_request")
    assert (found["status"], found.get("route"), found["method"]) == (status, route, method)
    assert found["level"] == ("WARNING" if status >= 500 else "INFO")


def test_a_wrong_key(server: Running) -> None:
    headers = {"authorization": "Bearer a-wrong-key", "x-request-id": "k"}
    assert server.client.get("/metrics", headers=headers).status_code == 401
    assert line(server, "k")["error"] == "unauthorized"


def test_a_stream_that_is_late(server: Running) -> None:
    server.post("/invocations", LONG | {"stream": True}, headers=named("late"))
    found = line(server, "late")
    assert (found["level"], found["status"], found["error"]) == ("WARNING", 200, "late")
    assert found["output_tokens"] > 0 and "finish_reasons" not in found


def test_a_client_that_leaves(server: Running) -> None:
    body = LONG | {"stream": True}
    with server.client.stream("POST", "/invocations", json=body, headers=named("left")) as answer:
        next(answer.iter_lines())
    found = line(server, "left")
    assert (found["level"], found["status"], found["error"]) == ("INFO", 200, "client_gone")


def test_a_client_that_leaves_in_the_midst_of_its_body(server: Running) -> None:
    """It is no failure of the server's."""
    head = f"POST /invocations HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {KEY}\r\n"
    for own, body in (
        ("half", "Content-Length: 100\r\n\r\n{"),
        ("chunk", "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"),
    ):
        address = server.client.base_url.host, server.client.base_url.port or 0
        with socket.create_connection(address) as connection:
            connection.sendall(f"{head}X-Request-Id: {own}\r\n{body}".encode())
        found = line(server, own)
        assert (found["level"], found["status"], found["error"]) == ("INFO", 499, "client_gone")
    assert "Traceback" not in server.log.read_text()


def test_ids(server: Running) -> None:
    def answered(**headers: str) -> str:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return server.client.get("/v1/models", headers=named).headers["x-request-id"]

    both = answered(x_amzn_sagemaker_inference_id="from-sagemaker", x_request_id="other")
    assert both == "from-sagemaker" and line(server, both)["route"] == "/v1/models"
    for unfit in ("", "a b", "a" * 129, 'a"b', "a\tb"):
        own = answered(x_request_id=unfit)
        assert re.fullmatch("[0-9a-f]{32}", own) and line(server, own)["status"] == 200
    assert answered(x_request_id="a" * 128) == "a" * 128
    assert answered() != answered()


def test_pings_are_not_told(server: Running) -> None:
    for path in ("/ping", "/metrics"):
        headers = server.client.get(path, headers=named("quiet")).headers
        assert headers["x-request-id"] == "quiet"
    server.client.get("/v1/models", headers=named("after"))
    line(server, "after")
    assert not [entry for entry in lines(server) if entry["id"] == "quiet"]


def test_nothing_of_what_was_said(server: Running) -> None:
    """After all of the above."""
    server.post("/invocations", {"inputs": SECRET})
    page = server.log.read_text()
    words = (SECRET, SECRET.replace(" ", "%20"), KEY, "a-wrong-key", "ten", "10")
    assert not [word for word in words[:4] if word in page]
    assert not any(word in str(entry.get("message")) for entry in lines(server) for word in words)


def test_embeddings_and_models(tmp_path: Path, checkpoints: Path) -> None:
    options = ("--models-root", str(checkpoints), "--log-format=json")
    with serving(tmp_path, "--multi-model", *options, OPTION_BACKEND="cpu") as server:
        server.wait_ready()
        url = str(checkpoint(checkpoints, "bert"))
        server.post("/models", {"model_name": "bert", "url": url}, headers=named("load"))
        body = {"inputs": [[5, 6, 7], [8]]}
        answer = server.post("/models/bert/invoke", body, headers=named("embed"))
        assert answer.status_code == 200
        found = line(server, "embed")
        assert (found["route"], found["model"]) == ("/models/{name}/invoke", "bert")
        assert (found["prompt_tokens"], found["output_tokens"]) == (4, 0)
        assert line(server, "load")["route"] == "/models"
        server.client.put(f"/models/{SECRET}", headers=named("put"))
        assert line(server, "put")["status"] == 405 and SECRET not in server.log.read_text()
        assert server.gauge('lmi_requests_total{outcome="done"}') == 2


@pytest.mark.parametrize("level", ["debug", "warning"])
def test_levels_as_text(tmp_path: Path, level: str) -> None:
    with serving(tmp_path, "demo", LMI_MULTI_LOG_LEVEL=level) as server:
        server.wait_ready()
        server.client.get("/ping", headers=named("p"))
        server.client.get("/v1/models", headers=named("m"))
        server.client.get("/nothing", headers=named("n"))
        assert server.stop() == 0
    told = re.findall(r"(\w+) lmi_multi.serve.request_log: request (.*)", server.log.read_text())
    if level == "warning":
        assert told == []
        return
    [(kind, fields)] = [pair for pair in told if "id=m " in pair[1]]
    assert kind == "INFO" and re.fullmatch(
        r"id=m method=GET route=/v1/models status=200 seconds=\d+\.\d+", fields
    )
    assert {kind for kind, fields in told if "id=p " in fields} == {"DEBUG"}
    assert {kind for kind, fields in told if "id=n " in fields} == {"INFO"}
