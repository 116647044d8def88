"""A step that does not fit the GPU costs one request, and the others get their answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lmi_multi.engine.batch import Batch
from tests.serve.running import serving
from tests.tiny_models import Watched, artifact, executor, is_clean, model

OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "seed": 3},
    {"num_beams": 3},
    {"do_sample": True, "seed": 4, "num_return_sequences": 2},
]
LONG = [5] * 30


def tokens(batch: Batch) -> int:
    """Of the largest prompt in a step."""
    own = [len(row.token_ids) for row in batch.rows] + [len(p.token_ids) for p in batch.prompts]
    return max(own)


class Tight(Watched):
    """An executor with memory for prompts of fewer than `least` tokens."""

    least = len(LONG)

    def step(self, batch: Batch) -> Any:
        if tokens(batch) >= self.least:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return super().step(batch)


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama-gqa"])
def test_the_others_go_on(family: str, checkpoints: Path) -> None:
    built = artifact(checkpoints, family)
    prompts = [[7, 8, 9], [4] * 12, LONG, [6], [9, 3] * 5]
    options = [{"max_new_tokens": 9, **o} for o in (*OPTIONS[:2], {}, *OPTIONS[2:])]
    with model(built) as plain, model(built, Tight(executor(built))) as opened:
        expected = plain.generate(prompts, options)
        found = opened.generate(prompts, options)
        for own, other in zip(expected, found, strict=True):
            if own.prompt == LONG:
                assert other.finish_reason == "out_of_memory" and not other.token_ids
                assert other.error == (
                    "a step with it does not fit the GPU: CUDA out of memory. Tried to allocate 9 "
                    "GiB."
                )
            else:
                assert (own.token_ids, own.finish_reason) == (other.token_ids, other.finish_reason)
        assert is_clean(opened)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_no_memory_at_all_every_request_fails(
    options: dict[str, Any], checkpoints: Path
) -> None:
    built = artifact(checkpoints, "gpt2")
    tight = Tight(executor(built))
    with model(built, tight) as opened:
        tight.least = 0
        answers = opened.generate([[5, 6], [7], LONG, [8]] * 3, options, max_new_tokens=5)
        assert {answer.finish_reason for answer in answers} == {"out_of_memory"}
        assert is_clean(opened)
        tight.least = 10**6
        assert opened.generate([[5, 6]], options, max_new_tokens=5)[0].error is None


PATCH = """
import torch
from lmi_multi.backends.torch_executor import TorchExecutor

step = TorchExecutor.step

def tight(self, batch):
    if any(len(row.token_ids) > 40 for row in batch.rows):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return step(self, batch)

TorchExecutor.step = tight
"""


def test_the_server_answers_507_and_goes_on(tmp_path: Path) -> None:
    """In the server's own engine, whose process finds the executor patched."""
    built = artifact(tmp_path, "gpt2", tokenizer=True)
    (tmp_path / "sitecustomize.py").write_text(PATCH)
    long, body = "a" * 60, {"max_new_tokens": 30, "ignore_eos": True}
    with serving(tmp_path, str(built.folder), PYTHONPATH=str(tmp_path)) as server:
        server.wait_ready()

        def ask(text: str, stream: bool = False) -> httpx.Response:
            asked = {"inputs": text, "parameters": body, "stream": stream}
            return server.post("/invocations", asked)

        alone = ask("ab")
        assert alone.status_code == 200
        for _ in range(2):
            refused = ask(long)
            assert refused.status_code == 507 and "out_of_memory" in refused.text
        assert "out_of_memory" in ask(long, stream=True).text
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, ["ab", "ab", long, "ab"]))
        assert [answer.status_code for answer in answers] == [200, 200, 507, 200]
        assert {a.text for a in answers if a.status_code == 200} == {alone.text}
        assert server.gauge("lmi_engine_restarts") == 0
        assert server.gauge('lmi_requests_total{outcome="failed"}') == 4
