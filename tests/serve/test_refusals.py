"""Requests that are refused: the status of each, and the words that say what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serve.running import Running, serving


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/invocations",
            {"input": "a"},
            "unknown field 'input'; known: inputs, parameters, stream",
        ),
        ("/invocations", {}, "inputs: Field required"),
        ("/invocations", {"inputs": 5}, "inputs is 5; allowed: a string, a list of strings,"),
        ("/invocations", {"inputs": "a", "parameters": {"top_k": -1}}, "top_k is -1; allowed: an"),
        ("/invocations", {"inputs": "a", "parameters": {"topk": 1}}, "did you mean 'top_k'?"),
        ("/invocations", {"inputs": []}, "0 prompts are given; allowed: 1 to 1000"),
        ("/invocations", {"inputs": [5, 10**9]}, "holds token id 1000000000, must be 0 to"),
        ("/invocations", {"inputs": "a" * 5000}, "must be at most"),
        ("/invocations", {"inputs": ["a", "b"], "stream": True}, "allowed: with one prompt"),
        ("/v1/completions", {"prompt": "a", "best_of": 3}, "unknown field 'best_of'; known: model"),
        ("/v1/completions", {"prompt": "a", "n": 17}, "n is 17; allowed: an integer"),
        (
            "/v1/completions",
            {"prompt": "a", "stream_options": {"include_usage": True}},
            "stream_options is set, yet stream is false; allowed: with stream=true",
        ),
        (
            "/v1/completions",
            {"prompt": "a", "temperature": "1"},
            "temperature is '1': Input should",
        ),
        ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, "model is 'gpt-4'; allowed: 'demo'"),
        ("/v1/chat/completions", {"messages": []}, "messages is []: List should have at least 1"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "chat template"),
    ],
)
def test_wrong_requests(demo_server: Running, path: str, body: Any, message: str) -> None:
    answer = demo_server.post(path, body)
    assert answer.status_code == (404 if "gpt-4" in message else 400)
    error = answer.json()["error"]
    assert message in (error["message"] if path.startswith("/v1") else error)


def test_bodies_that_are_no_json(demo_server: Running) -> None:
    def post(content: bytes) -> tuple[int, str]:
        answer = demo_server.client.post("/invocations", content=content)
        return answer.status_code, answer.text

    assert post(b"{")[0] == 400
    assert post(b'"\xff"') == (400, '{"error":"the body is no UTF-8 at byte 1","code":400}')
    assert "NaN is no JSON number" in post(b'{"inputs": "a", "parameters": {"top_p": NaN}}')[1]
    assert post(b"[" * 100_000)[0] == 400
    twice = b'{"inputs": "a", "parameters": {"top_k": 1, "seed": 2, "top_k": 3}}'
    assert post(twice)[0] == 400 and "'top_k' is given twice" in post(twice)[1]
    assert post(b'{"inputs": "\\ud800"}')[0] == 400
    assert post(b" " * (6 << 20) + b"[]")[0] == 413
    assert demo_server.client.get("/nothing").status_code == 404
    for path, methods in (("/invocations", "POST"), ("/metrics", "GET"), ("/v1/models", "GET")):
        refused = demo_server.client.delete(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, methods)


def test_a_key_guards_every_route_but_ping(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", LMI_MULTI_API_KEY="secret") as server:
        server.wait_ready()
        for path in ("/metrics", "/v1/models", "/docs", "/openapi.json", "/nothing"):
            answer = server.client.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert isinstance(error, dict) == path.startswith("/v1/")
        wrong = {"authorization": "Bearer secre"}
        assert server.post("/invocations", {"inputs": "a"}, headers=wrong).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert server.post("/invocations", {"inputs": "ten"}, headers=right).status_code == 200
        assert "secret" not in server.log.read_text()
