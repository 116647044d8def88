"""Several GPUs over NCCL: the same tokens as one, by slices, by stages, and by both."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lmi_multi
from lmi_multi import backends
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import RankError
from lmi_multi.model import Model
from lmi_multi.parallel.collectives import TorchCollectives
from lmi_multi.parallel.local import LocalRanks
from tests import tiny_models
from tests.matrix import SharedRanks
from tests.test_cuda_graphs import LIMITS, assert_same_as_cpu

pytestmark = pytest.mark.cuda

PROMPTS = [[5, 6, 7], [8], list(range(9, 60))]
OPTIONS: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 3}, {"num_beams": 2}]


def need(gpus: int, kernels: bool = False) -> None:
    """Skip where there are fewer, or no compiled kernels."""
    state = backends.probe("cuda")
    if not state.ok or (kernels and state.reason != "compiled kernels"):
        pytest.skip(f"cuda: {state.reason}")
    if gpus > len(state.devices):
        pytest.skip(f"cuda: {gpus} GPUs wanted, {len(state.devices)} here")


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_tokens_are_those_of_one_gpu(
    checkpoints: Path, family: str, tensor: int, pipeline: int
) -> None:
    need(tensor * pipeline)
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


class Shelf:
    """A rank's executor on a GPU of its own; its collectives are NCCL's even if it is alone."""

    def __init__(self, near: bool, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.peers = TorchCollectives()
        if near:
            from lmi_multi.backends.cuda.near import connect_memory

            connect_memory(self.peers, self.device)
            assert self.peers.near is not None, "see the log: why not"

    def open(self, folder: Path) -> None:
        from lmi_multi.backends.cuda.executor import CudaExecutor
        from lmi_multi.backends.cuda.kernels import missing
        from lmi_multi.backends.cuda.ops import Scratch

        assert not missing()
        artifact = Artifact.open(folder)
        loaded = artifact.load_rank(self.rank, self.size)
        tensors = {name: tensor.to(self.device) for name, tensor in loaded.items()}
        scratch = Scratch(self.device)
        self.executor = CudaExecutor(artifact.spec, tensors, LIMITS, scratch, self.peers)

    def use(self, method: str, *arguments: Any) -> Any:
        return getattr(self.executor, method)(*arguments)

    def captured(self) -> tuple[int, int]:
        """How many graphs there are, of steps and of prefills, all of which could be had."""
        opened = self.executor
        assert opened._fed and opened._ahead and opened._prefill_graphs
        steps = opened._fed._captured | opened._ahead._graphs._captured
        prefills = opened._prefill_graphs._captured
        assert all(steps.values()) and all(prefills.values())
        return len(steps), len(prefills)


@pytest.mark.parametrize(("count", "near"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", ["t5", "gpt2", "bloom", "gptj", "llama"])
def test_captured_steps_over_nccl(checkpoints: Path, family: str, count: int, near: bool) -> None:
    """Greedy and sampled, rows that come and go; sums by NCCL or, `near`, over peer memory. One GPU
    suffices to see whether NCCL's calls can be captured at all: a world of one, with nothing left
    out that several would say."""
    need(count, kernels=True)
    ranks = LocalRanks(count, partial(Shelf, near), "nccl")
    try:
        artifact = tiny_models.artifact(checkpoints, family)
        model = Model(artifact, "cuda", SharedRanks(ranks, artifact.folder, LIMITS))
        assert_same_as_cpu(checkpoints, family, model)
        steps, prefills = ranks.call("captured")
        assert steps > 8 and prefills
    finally:
        ranks.close()


@pytest.mark.parametrize(
    ("sent", "message", "seconds"),
    [
        (signal.SIGKILL, "rank 1 died: killed by SIGKILL", 2),
        (signal.SIGSTOP, "rank 1 hangs: nothing was heard for 15 s", 20),
    ],
)
@pytest.mark.parametrize("memory", ["1", "0"])
def test_a_rank_that_fails(
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Path,
    sent: int,
    message: str,
    seconds: float,
    memory: str,
) -> None:
    """While the other one's GPU waits for it in a graph, in NCCL or in a sum over peer memory."""
    need(2, kernels=True)
    monkeypatch.setenv("LMI_MULTI_CUDA_PEER_MEMORY", memory)
    folder = tiny_models.checkpoint(checkpoints, "gpt2")
    with lmi_multi.load(folder, backend="cuda", tensor_parallel=2, max_batch=2) as model:
        ranks = model._engine.executor._ranks.ranks  # type: ignore[attr-defined]
        processes, began = [rank.process for rank in ranks], 0.0
        with pytest.raises(RankError) as caught:
            for chunk in model.stream([[5, 6, 7]], max_new_tokens=100, ignore_eos=True):
                if not began and chunk.token_ids:
                    os.kill(processes[1].pid, sent)
                    began = time.monotonic()
        assert time.monotonic() - began < seconds
    assert str(caught.value) == message
    assert not any(process.is_alive() for process in processes)
