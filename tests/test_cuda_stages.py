"""The CUDA executor on the stages of a pipeline, each a thread, with the kernels stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda.executor import CudaExecutor
from lmi_multi.backends.cuda.ops import Scratch
from torch import Tensor

from lmi_multi.backends import microbatches
from lmi_multi.engine.batch import Batch, Passage, Prompt, StepResult
from lmi_multi.model import Model
from lmi_multi.models.stages import Stage
from lmi_multi.parallel.collectives import SingleRank
from tests import test_cuda_graphs, tiny_models
from tests.cuda_stand_ins import Programs
from tests.test_cuda_ahead import programs  # noqa: F401
from tests.test_cuda_graphs import cpu_model, prompts

# Prompts that come to nobody's rows are larger steps.
LIMITS = replace(test_cuda_graphs.LIMITS, max_idle_tokens=192)
PATIENCE = 60  # seconds for what another stage sends


class Queues:
    """A pipeline between two threads."""

    def __init__(self, stage: Stage, onward: Queue[Tensor], back: Queue[Tensor]) -> None:
        self.stage, self.first, self.last = stage, stage.first, stage.last
        self._onward, self._back = onward, back

    def send(self, x: Tensor) -> None:
        self._onward.put(x.clone())

    def receive(self, x: Tensor) -> Tensor:
        return x.copy_(self._onward.get(timeout=PATIENCE))

    def share(self, x: Tensor) -> Tensor:
        if not self.last:
            return x.copy_(self._back.get(timeout=PATIENCE))
        self._back.put(x.clone())
        return x


class TwoStages:
    """An executor whose two stages are called together; the last one answers."""

    limits, device = LIMITS, "two stages"

    def __init__(self, folder: Path, family: str) -> None:
        artifact = tiny_models.artifact(folder, family)
        onward, back = Queue[Tensor](), Queue[Tensor]()
        self.stages = []
        for stage in artifact.stages(2):
            tensors = artifact.load_rank(0, 1, stage.tensors(t.name for t in artifact.stored))
            collectives = SingleRank(Queues(stage, onward, back))
            scratch = Scratch(torch.device("cpu"))
            self.stages.append(CudaExecutor(artifact.spec, tensors, LIMITS, scratch, collectives))
        self._pool = ThreadPoolExecutor(2)

    def _call(self, name: str, *arguments: Any) -> Any:
        calls = [self._pool.submit(getattr(stage, name), *arguments) for stage in self.stages]
        return [call.result() for call in calls][-1]

    def step(self, batch: Batch) -> StepResult:
        result: StepResult = self._call("step", batch)
        return result

    def logits(self, batch: Batch) -> Tensor:
        result: Tensor = self._call("logits", batch)
        return result

    def encode(self, own: list[Prompt]) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self._call("encode", own)
        return result

    def score(self, passages: list[Passage]) -> Tensor:
        result: Tensor = self._call("score", passages)
        return result

    def close(self) -> None:
        self._pool.shutdown()
        for stage in self.stages:
            stage.close()


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps are split into parts of a few tokens."""
    monkeypatch.setattr(microbatches, "TOKENS", 7)
    yield


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama-gqa", "bloom"])
def test_answers_are_those_of_the_cpu(
    tmp_path: Path, family: str, programs: Programs  # noqa: F811
) -> None:  # fmt: skip
    staged = TwoStages(tmp_path, family)
    model = Model(tiny_models.artifact(tmp_path, family), "cuda", staged)
    own = prompts(5, 3)
    with cpu_model(tmp_path, family) as cpu, model:
        for more in ({}, {"do_sample": True, "seed": 2}, {"num_beams": 2}):
            chosen: dict[str, Any] = {"max_new_tokens": 8, **more}
            expected = [c.token_ids for c in cpu.generate(own, chosen)]
            assert [c.token_ids for c in model.generate(own, chosen)] == expected
        for ours, theirs in zip(model.encode(own), cpu.encode(own), strict=True):
            torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-5)
        answers = [[3, 4, 5], [6], [7, 8], [9] * 7, [10]]
        known = (chosen.score(own, answers) for chosen in (model, cpu))
        for ours, theirs in zip(*known, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5)
        # Messages between stages are in no graph.
        assert all(stage._fed is None and stage._ahead is None for stage in staged.stages)
        assert all(stage._prefill_graphs is None for stage in staged.stages)
        assert not programs.runs
