"""Batch transform's lines for an encoder: as many texts as one request may have, in its time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import lmi_multi
from tests.serve.running import Running, serving
from tests.tiny_models import checkpoint

TIME = 5.0
MOST = 20_000


@pytest.fixture(scope="module")
def folder(checkpoints: Path) -> Path:
    return checkpoint(checkpoints, "bert")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = ("--dtype=fp32", f"--request-timeout={TIME}", f"--max-queue={MOST}")
    place = tmp_path_factory.mktemp("lines")
    with serving(place, str(folder), *limits, OPTION_MAX_QUEUE_TOKENS="10000000") as running:
        running.wait_ready()
        yield running


def lines(server: Running, *bodies: dict[str, Any]) -> httpx.Response:
    return server.client.post(
        "/invocations",
        content="\n".join(map(json.dumps, bodies)),
        headers={"content-type": "application/jsonlines"},
    )


def test_each_line_has_its_own_parameters(server: Running, folder: Path) -> None:
    other = {"pooling": "cls", "normalize": False}
    answer = lines(server, {"inputs": [5, 6]}, {"inputs": [[7], [8]], "parameters": other})
    one, two = map(json.loads, answer.text.splitlines())
    with lmi_multi.load(folder, backend="cpu", dtype="fp32") as model:
        assert np.allclose(one, model.embed([[5, 6]])[0], atol=1e-5)
        assert np.allclose(two, model.embed([[7], [8]], "cls", False), atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pooling": "max"}, "pooling is 'max': Input should be 'mean', 'cls' or 'last'"),
        ({"normalize": "no"}, "normalize is 'no': Input should be a valid boolean"),
        ({"max_new_tokens": 5}, "unknown field 'max_new_tokens'; known: pooling, normalize"),
    ],
)
def test_what_is_wrong_is_told(server: Running, parameters: dict[str, Any], message: str) -> None:
    wrong = {"inputs": [5], "parameters": parameters}
    answer = lines(server, {"inputs": [5]}, wrong)
    assert answer.status_code == 400 and answer.json()["error"] == f"line 2: {message}"
    answer = server.post("/invocations", wrong)
    assert answer.status_code == 400 and answer.json()["error"] == message


def test_lines_are_capped(server: Running) -> None:
    answer = lines(server, *[{"inputs": [5]}] * (MOST + 1))
    assert answer.status_code == 400
    assert answer.json()["error"] == f"{MOST + 1} prompts are given; allowed: 1 to {MOST}"


def test_all_lines_have_one_request_s_time(server: Running) -> None:
    """Each of them with a time of its own would be let run for a day: these for half a minute."""
    texts = [{"inputs": [[5] * 60] * 10}] * (MOST // 10)
    answer = lines(server, *texts)
    assert answer.elapsed.total_seconds() < 4 * TIME
    assert answer.status_code in (200, 504)
    server.until(lambda: server.gauge("lmi_in_flight") == 0)
    assert server.post("/invocations", {"inputs": [5]}).status_code == 200
