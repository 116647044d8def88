"""Steps that no row waits for: they may be larger than others, and end where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmi_multi.engine.batch import Batch
from lmi_multi.engine.scheduler import Scheduler
from tests.test_scheduler import LIMITS, requests, sequence
from tests.tiny_models import Watched, artifact, executor, is_clean, model


def test_while_nothing_runs_prompts_come_in_large_steps() -> None:
    scheduler = Scheduler(replace(LIMITS, max_idle_tokens=30))
    own = [sequence(prompt, 3) for prompt in (12, 12, 12, 5)]
    for one in own:
        scheduler.add(one)
    parts = []
    while not all(one.generated for one in own):
        batch, shares = scheduler.plan()
        parts.append([len(row.token_ids) for row in batch.rows])
        for row, one in zip(batch.rows, requests(shares), strict=True):
            if row.sample:
                one.push(5)
        scheduler.commit(shares)
    # 6 of the third prompt are left, and take turns with the rows that now run.
    assert parts == [[12, 12, 6], [1, 1, 6], [1, 1, 1, 5]]


def test_a_prompt_that_is_half_done_goes_on_in_large_steps() -> None:
    scheduler = Scheduler(replace(LIMITS, max_idle_tokens=30))
    scheduler.add(sequence(50, 3))
    parts = []
    for _ in range(2):
        batch, shares = scheduler.plan()
        parts.append([len(row.token_ids) for row in batch.rows])
        scheduler.commit(shares)
        scheduler.add(sequence(9, 3))
    assert parts == [[30], [20, 9]]


def test_while_nothing_runs_encoders_take_many_prompts() -> None:
    scheduler = Scheduler(replace(LIMITS, max_idle_tokens=30))
    for length in (12, 12, 6, 4):
        scheduler.add(sequence(length, 5, encoder=True))
    parts = []
    for _ in range(2):
        batch, shares = scheduler.plan()
        parts.append([len(prompt.token_ids) for prompt in batch.prompts])
        for own in requests(shares):
            own.push(5)
        scheduler.commit(shares)
    assert parts == [[12, 12, 6], [4]]


class Short(Watched):
    """An executor with memory for steps of `most` tokens, an encoder's by themselves."""

    most = 64

    def step(self, batch: Batch) -> Any:
        for parts in (batch.rows, batch.prompts):
            if sum(len(part.token_ids) for part in parts) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return super().step(batch)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_large_steps_end_where_they_do_not_fit(
    family: str, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody fails for a step that is large because no row waits for it."""
    built = artifact(checkpoints, family)
    limits = {"max_batch": 8, "max_step_tokens": 20, "blocks": 128}
    short = Short(executor(built, max_idle_tokens=64, **limits))
    with model(built, **limits) as plain, model(built, short) as opened:
        for most in (64, 40):
            short.most = most
            prompts = [[most - n] * 12 for n in range(8)]  # others each time: none is cached
            expected, found = (own.generate(prompts, max_new_tokens=4) for own in (plain, opened))
            assert [own.token_ids for own in found] == [own.token_ids for own in expected]
            said = [r.message for r in caplog.records if "a large step does not fit" in r.message]
            assert len(said) == (most < 64), said
        sizes = [sum(len(part.token_ids) for part in b.prompts or b.rows) for b in short.batches]
        assert max(sizes) > 40
        assert is_clean(opened)


@pytest.mark.parametrize(
    ("family", "prompts", "most", "reasons"),
    [
        ("t5", [[5] * 30], 25, ["out_of_memory"]),  # an encoder takes it whole, however often
        ("gpt2", [[5] * 12, [6] * 5], 10, ["out_of_memory", "length"]),
        ("t5", [[5] * 12, [6] * 5], 10, ["out_of_memory", "length"]),
    ],
)
def test_a_request_that_does_not_fit_fails(
    family: str, prompts: list[list[int]], most: int, reasons: list[str], checkpoints: Path
) -> None:
    built = artifact(checkpoints, family)
    limits = {"max_batch": 8, "max_step_tokens": 20, "max_idle_tokens": 64, "blocks": 128}
    short = Short(executor(built, **limits))
    short.most = most
    with model(built, short) as opened:
        found = opened.generate(prompts, max_new_tokens=4, ignore_eos=True)
        assert [own.finish_reason for own in found] == reasons
        # Steps of few tokens do not end large ones.
        kept = opened.engine.scheduler.limits.max_idle_tokens
        assert kept == (0 if len(prompts[0]) > 20 else 64)
        assert is_clean(opened)


def test_a_step_beside_rows_that_run_is_not_a_large_one(checkpoints: Path) -> None:
    """Though its encoder's tokens and its rows are more than `max_step_tokens` together."""
    built = artifact(checkpoints, "t5")
    limits = {"max_batch": 8, "max_step_tokens": 20, "max_idle_tokens": 64, "blocks": 128}
    short = Short(executor(built, **limits))
    with model(built, short) as opened:
        stream = opened.stream([7, 8], max_new_tokens=20, ignore_eos=True)
        next(stream)
        short.most = 19
        [found] = opened.generate([[5] * 20], max_new_tokens=4)
        assert found.finish_reason == "out_of_memory"
        assert opened.engine.scheduler.limits.max_idle_tokens == 64
        list(stream)
        assert is_clean(opened)
