"""Several GPUs over NCCL: the same tokens as one, by slices, by stages, and by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lmi_multi
from lmi_multi import backends
from tests import tiny_models

pytestmark = pytest.mark.cuda

PROMPTS = [[5, 6, 7], [8], list(range(9, 60))]
OPTIONS: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 3}, {"num_beams": 2}]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_tokens_are_those_of_one_gpu(
    checkpoints: Path, family: str, tensor: int, pipeline: int
) -> None:
    state = backends.probe("cuda")
    if not state.ok:
        pytest.skip(f"cuda: {state.reason}")
    if tensor * pipeline > len(state.devices):
        pytest.skip(f"cuda: {tensor * pipeline} GPUs wanted, {len(state.devices)} here")
    folder = tiny_models.checkpoint(checkpoints, family)
    answers = []
    for ranks in ({}, {"tensor_parallel": tensor, "pipeline_parallel": pipeline}):
        with lmi_multi.load(
            folder, backend="cuda", dtype="fp32", max_batch=2, max_tokens=100, **ranks
        ) as model:
            answers.append(
                [
                    [c.token_ids for c in model.generate(PROMPTS, max_new_tokens=12, **own)]
                    for own in OPTIONS
                ]
            )
    assert answers[0] == answers[1]
