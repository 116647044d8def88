"""Embeddings that take long: others are answered meanwhile, and nothing counts as hung."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmi_multi
from tests.serve.running import Running, serving
from tests.tiny_models import checkpoint

TEXT = list(range(5, 60))
TEXTS = 34_000  # more than is embedded within a request's time: it takes 17 s of a processor
MANY: dict[str, Any] = {"input": [TEXT] * TEXTS}
STEP, TIME = 6.0, 8.0


@pytest.fixture(scope="module")
def folder(checkpoints: Path) -> Path:
    return checkpoint(checkpoints, "gptneox", tokenizer=True)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("embeddings")
    limits = (
        f"--step-timeout={STEP}",
        f"--request-timeout={TIME}",
        "--max-tokens=64",
        f"--max-queue={TEXTS}",
    )
    limits += ("--dtype=fp32",)
    with serving(place, str(folder), *limits, OPTION_MAX_QUEUE_TOKENS="10000000") as running:
        running.wait_ready()
        yield running
        assert running.gauge("lmi_engine_restarts") == 0


def idle(server: Running) -> None:
    server.until(lambda: server.gauge("lmi_in_flight") == 0)


def test_many_texts_are_those_of_few(server: Running, folder: Path) -> None:
    found = server.post("/v1/embeddings", {"input": [TEXT[: n % 50 + 1] for n in range(200)]})
    vectors = [entry["embedding"] for entry in found.json()["data"]]
    with lmi_multi.load(folder, backend="cpu", dtype="fp32") as model:
        expected = model.embed([TEXT[: n + 1] for n in range(50)])
    assert np.allclose(vectors, np.tile(expected, (4, 1)), atol=1e-5)


def test_others_are_answered_meanwhile_and_time_is_up(server: Running) -> None:
    """It takes longer than a step may, without being taken for one, and ends with its time."""
    before = server.gauge('lmi_requests_total{outcome="failed"}')
    body = {"inputs": "ab", "parameters": {"max_new_tokens": 5}}
    answered = 0
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.post, "/v1/embeddings", MANY)
        server.until(lambda: server.gauge("lmi_in_flight") == 1)
        while not long.done():
            assert server.post("/invocations", body).status_code == 200
            answered += 1
        answer = long.result()
    assert answer.status_code == 504 and "within 8 s" in answer.text
    assert answered > 5
    assert server.gauge('lmi_requests_total{outcome="failed"}') == before + TEXTS
    idle(server)
    assert server.post("/v1/embeddings", {"input": [TEXT]}).status_code == 200


def test_a_client_that_leaves_ends_it(server: Running) -> None:
    aborted = 'lmi_requests_total{outcome="aborted"}'
    before = server.gauge(aborted)
    with server.asking("/v1/embeddings", MANY):
        server.until(lambda: server.gauge("lmi_in_flight") == 1)
    server.until(lambda: server.gauge(aborted) == before + TEXTS)
    # Behind all of those it would be late.
    assert server.post("/v1/embeddings", {"input": [TEXT]}).status_code == 200
