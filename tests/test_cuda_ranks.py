"""Several GPUs over NCCL: the same tokens as one, by slices, by stages, and by both."""

from __future__ import annotations

import logging
import os
import random
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
from lmi_multi.checkpoint.convert import convert
from lmi_multi.engine.batch import Row
from lmi_multi.errors import RankError
from lmi_multi.model import Model
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.parallel.collectives import TorchCollectives
from lmi_multi.parallel.local import LocalRanks
from lmi_multi.parallel.ranks import _end
from tests import tiny_models
from tests.families import VOCAB
from tests.matrix import SharedRanks
from tests.test_cuda_graphs import LIMITS, assert_same_as_cpu, prompts

pytestmark = pytest.mark.cuda

PROMPTS = [[5, 6, 7], [8], list(range(9, 60))]
OPTIONS: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 3}, {"num_beams": 2}]


def need(gpus: int, kernels: bool = False, near: bool = False) -> None:
    """Skip where there are fewer, or no compiled kernels, or none that access each other."""
    state = backends.probe("cuda")
    if not state.ok or (kernels and state.reason != "compiled kernels"):
        pytest.skip(f"cuda: {state.reason}")
    if gpus > len(state.devices):
        pytest.skip(f"cuda: {gpus} GPUs wanted, {len(state.devices)} here")
    if near and not all(torch.cuda.can_device_access_peer(0, peer) for peer in range(1, gpus)):
        pytest.skip("cuda: these GPUs do not access each other's memory")


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

    program_rows: int | None = None

    def __init__(self, near: bool, rank: int, size: int) -> None:
        logging.basicConfig(level=logging.INFO)  # whether sums go over peer memory, or why not
        self.rank, self.size = rank, size
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.peers = TorchCollectives()
        from lmi_multi.backends.cuda.kernels import missing

        assert not missing()
        if near:
            from lmi_multi.backends.cuda.near import connect_memory

            connect_memory(self.peers, self.device)
            assert self.peers.near is not None, "see the log: why not"

    def open(self, folder: Path) -> None:
        """A network that the kernels cover: its heads' sizes are multiples of 8."""
        from lmi_multi.backends.cuda.executor import CudaExecutor
        from lmi_multi.backends.cuda.ops import Scratch

        artifact = Artifact.open(folder)
        loaded = artifact.load_rank(self.rank, self.size)
        tensors = {name: tensor.to(self.device) for name, tensor in loaded.items()}
        scratch = Scratch(self.device)
        self.executor = CudaExecutor(
            artifact.spec, tensors, LIMITS, scratch, self.peers, program_rows=self.program_rows
        )

    def use(self, method: str, *arguments: Any) -> Any:
        return getattr(self.executor, method)(*arguments)

    def captured(self) -> int:
        """How many graphs of steps there are, all of which could be had."""
        opened = self.executor
        assert opened._fed and opened._ahead
        steps = [*opened._fed._captured.values(), *opened._ahead._graphs._captured.values()]
        assert all(steps)
        return len(steps)

    @torch.inference_mode()
    def prefilled(self) -> list[float]:
        """How far logits by graphs of prefills are from those of the same kernels uncaptured."""
        opened, found = self.executor, []
        graphs, chance = opened._prefill_graphs, random.Random(0)
        assert graphs is not None
        for lengths in ((3,), (16, 1), (5, 30, 9)):
            rows = [
                Row([chance.randrange(3, VOCAB) for _ in range(n)], 0, [*range(i * 8, i * 8 + 8)],
                    n, sample=SampleRow())
                for i, n in enumerate(lengths)
            ]  # fmt: skip
            hidden, last = opened._prefill.decode(rows)
            plain = opened._network.logits(hidden.index_select(0, last)).clone()
            captured = graphs.logits(rows)
            assert captured is not None
            found.append(((captured - plain).norm() / plain.norm()).item())
        return found


@pytest.mark.parametrize(("count", "near"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", ["t5", "bloom", "gptj", "llama", "qwen2"])
def test_captured_steps_over_nccl(checkpoints: Path, family: str, count: int, near: bool) -> None:
    """Greedy and sampled, rows that come and go; sums by NCCL or, `near`, over peer memory. One GPU
    suffices to see whether NCCL's calls can be captured at all: a world of one, with nothing left
    out that several would say."""
    need(count, kernels=True, near=near)
    ranks = LocalRanks(count, partial(Shelf, near), "nccl")
    try:
        artifact = tiny_models.artifact(checkpoints, family)
        model = Model(artifact, "cuda", SharedRanks(ranks, artifact.folder, LIMITS))
        assert_same_as_cpu(checkpoints, family, model)
        assert ranks.call("captured") > 8
        own = prompts(4, 6)  # several greedy rows, and nothing else
        with tiny_models.model(artifact, **vars(LIMITS)) as cpu:
            expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=9)]
        model = Model(artifact, "cuda", SharedRanks(ranks, artifact.folder, LIMITS))
        with model:
            assert [c.token_ids for c in model.generate(own, max_new_tokens=9)] == expected
    finally:
        ranks.close()


@pytest.mark.parametrize(("count", "near"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_captured_prefills_over_nccl(
    checkpoints: Path, tmp_path: Path, family: str, count: int, near: bool
) -> None:
    """In bf16: the prefill kernel covers no fp32."""
    need(count, kernels=True, near=near)
    source = tiny_models.checkpoint(checkpoints, family)
    artifact = convert(source, tmp_path / "bf16", dtype="bf16")
    ranks = LocalRanks(count, partial(Shelf, near), "nccl")
    try:
        ranks.call("open", artifact.folder)
        assert max(ranks.call("prefilled")) < 0.03
    finally:
        ranks.close()


FAULTS = pytest.mark.parametrize(
    ("sent", "message", "seconds"),
    [
        (signal.SIGKILL, "rank 1 died: killed by SIGKILL", 2),
        (signal.SIGSTOP, "rank 1 hangs: nothing was heard for 15 s", 20),
    ],
)


def assert_noticed(
    monkeypatch: pytest.MonkeyPatch,
    model: Model,
    ranks: LocalRanks,
    tokens: int,
    sent: int,
    message: str,
    seconds: float,
) -> float:
    """Send rank 1 a signal once an answer of so many tokens has begun: the call fails in time, and
    leaves nobody. When that was, by `time.monotonic`."""
    noticed: list[float] = []

    def noted(*arguments: Any) -> None:
        noticed.append(time.monotonic())
        _end(*arguments)

    monkeypatch.setattr("lmi_multi.parallel.ranks._end", noted)
    processes, began = [rank.process for rank in ranks.ranks], 0.0
    with pytest.raises(RankError) as caught:
        for chunk in model.stream([[5, 6, 7]], max_new_tokens=tokens, ignore_eos=True):
            if not began and chunk.token_ids:
                os.kill(processes[1].pid, sent)
                began = time.monotonic()
    gone = time.monotonic() - began
    print(f"noticed in {noticed[0] - began:.2f} s, gone in {gone:.2f} s")
    assert not any(process.is_alive() for process in processes)
    assert str(caught.value) == message
    assert noticed[0] - began < seconds
    assert gone < seconds + 5
    return began


@FAULTS
@pytest.mark.parametrize("memory", ["1", "0"])
def test_a_rank_that_fails(
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Path,
    sent: int,
    message: str,
    seconds: float,
    memory: str,
) -> None:
    """While the other one's GPU waits for it in a graph, in NCCL or in a sum over peer memory. When
    the call fails both are gone, which the driver takes its time for."""
    need(2, kernels=True)
    monkeypatch.setenv("LMI_MULTI_CUDA_PEER_MEMORY", memory)
    folder = tiny_models.checkpoint(checkpoints, "llama")
    with lmi_multi.load(folder, backend="cuda", tensor_parallel=2, max_batch=2) as model:
        ranks = model.engine.executor._ranks  # type: ignore[attr-defined]
        began = assert_noticed(monkeypatch, model, ranks, 100, sent, message, seconds)
    assert time.monotonic() - began < seconds + 5  # the model closed as well
