"""The server over a network of transformers: the same routes, the same answers as offline."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lmi_multi
from tests.foreign_models import foreign
from tests.serve.running import Running, serving

PROMPTS = ["abc", "something", "else", "x"]


@pytest.fixture(scope="module")
def folder(checkpoints: Path) -> Path:
    return foreign(checkpoints, "phi", tokenizer=True)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """As a properties file asks for it that was made for DJL."""
    place = tmp_path_factory.mktemp("fallback")
    properties = place / "serving.properties"
    properties.write_text(f"engine=Accelerate\noption.model_id={folder}\noption.dtype=fp32\n")
    with serving(place, f"--properties={properties}", "--backend=cpu") as running:
        running.wait_ready()
        yield running


def test_answers_are_the_offline_ones(server: Running, folder: Path) -> None:
    with lmi_multi.load(folder, backend="cpu", fallback="transformers") as model:
        expected = [c.text for c in model.generate(PROMPTS, max_new_tokens=8)]
    parameters = {"max_new_tokens": 8}

    def ask(prompt: str) -> str:
        answer = server.post("/invocations", {"inputs": prompt, "parameters": parameters})
        return str(answer.json()["generated_text"])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, PROMPTS)) == expected
    body = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "stream": True}
    events = server.post("/v1/completions", body).text.split("\n\n")
    assert len(events) > 4 and events[-2] == "data: [DONE]"


def test_what_it_does_not_answer_is_the_client_s_to_mend(server: Running) -> None:
    beams = server.post("/invocations", {"inputs": "a", "parameters": {"num_beams": 2}})
    assert beams.status_code == 400 and "num_beams is 2; allowed: at most 1" in beams.text
    vectors = server.post("/v1/embeddings", {"input": "a"})
    assert vectors.status_code == 400 and "encodes and embeds nothing" in vectors.text
    assert server.ping() == 200
