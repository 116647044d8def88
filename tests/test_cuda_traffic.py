"""The CUDA executor under traffic of all kinds, with what needs a GPU stood in for as in
test_cuda_ahead.py."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lmi_multi.engine.batch import Batch
from tests import tiny_models
from tests.cuda_stand_ins import stand_in
from tests.test_cuda_ahead import open_model
from tests.test_cuda_graphs import cpu_model, prompts


class FailedStepError(Exception):
    """Of one that has or has not been computed."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_traffic_of_all_kinds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, seed: int
) -> None:
    """Rows of every kind come and go beside each other, while steps fail before, amid and after
    their work: what is answered is what a CPU answers, and all blocks come back."""
    stand_in(monkeypatch)
    chance, left = random.Random(seed), 0
    kinds: list[dict[str, Any]] = [
        *({}, {}, {"do_sample": True, "temperature": 0.8, "seed": 3}),
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "seed": 9},
        *({"repetition_penalty": 1.3}, {"logprobs": 2}, {"num_beams": 2}),
        {"no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.5, "logit_bias": {9: 1.0}},
        {"do_sample": True, "top_k": 9, "seed": 1, "frequency_penalty": 0.9, "min_new_tokens": 1},
        {"bad_words": [[5], [7, 9]], "forced_bos_token_id": 11, "forced_eos_token_id": 8},
    ]
    with cpu_model(tmp_path, family) as cpu, open_model(tmp_path, family) as model:
        opened: Any = model.engine.executor
        real = opened.step

        def step(batch: Batch) -> Any:
            nonlocal left
            left += sum(not row.token_ids for row in batch.rows)
            how = chance.random()
            if 0.1 < how < 0.2 and not any(row.beams for row in batch.rows):
                with torch.inference_mode():
                    opened._prepare(batch)
            found = real(batch) if how > 0.2 else None
            if how < 0.3:
                raise FailedStepError
            return found

        monkeypatch.setattr(opened, "step", step)
        own, alive, coming = [*prompts(6, seed + 1), [5], [7]], [], 25
        while alive or coming:
            if coming and chance.random() < 0.35:
                options = {"max_new_tokens": chance.choice((1, 2, 5, 12)), "ignore_eos": True}
                prompt, options = chance.choice(own), options | chance.choice(kinds)
                [job] = model._jobs([prompt], None, options)[2]
                model.engine.submit(job.requests)
                alive.append((job, cpu.generate([prompt], options)[0].token_ids))
                coming -= 1
            if alive and chance.random() < 0.05:
                model.engine.drop(alive.pop(chance.randrange(len(alive)))[0].requests)
            if not model.engine.scheduler.idle:
                with suppress(FailedStepError):
                    model.engine.step()
            for job, expected in alive:
                if all(request.finish_reason for request in job.requests):
                    assert job.answers[0].generated == expected
            alive = [
                (job, expected)
                for job, expected in alive
                if not all(request.finish_reason for request in job.requests)
            ]
        assert left and tiny_models.is_clean(model)
