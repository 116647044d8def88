"""An executor whose ranks live in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lmi_multi.backends.base import Executor, Limits
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.engine.batch import Batch, Passage, Prompt, StepResult
from lmi_multi.parallel import torchrun
from lmi_multi.parallel.grid import Grid
from lmi_multi.parallel.local import LocalRanks
from lmi_multi.parallel.ranks import Ranks
from lmi_multi.parallel.watch import GPU_TOKEN, TOKEN

Build = Callable[[Limits, int, int], Executor]
"""What makes a rank's executor: from limits, the rank's number, and how many there are."""


def open_ranks(
    grid: Grid, build: Build, limits: Limits, device: str, process_group: str, identity: str
) -> RankedExecutor:
    """An executor over the ranks of `grid`: processes of its own, or those that torchrun started.

    Under torchrun only rank 0's process returns; the others serve until it closes the executor,
    then raise SystemExit. There `limits` are this process's own, of which the least blocks and
    idle tokens count, and `identity` must be the same everywhere: it says what is loaded.
    """
    job = torchrun.job(grid.tensor, grid.pipeline)
    if job is None:
        of_rank = partial(build, limits)
        ranks: Ranks = LocalRanks(grid.size, of_rank, process_group, grid.answering)
    else:
        ranks, limits = torchrun.join(job, grid.answering, build, limits, process_group, identity)
    token_seconds = GPU_TOKEN if process_group == "nccl" else TOKEN
    return RankedExecutor(ranks, limits, device, token_seconds)


def identity(artifact: Artifact, grid: Grid) -> str:
    """What all ranks must agree on: which weights they load, and how they share them."""
    return f"weights {artifact.digest} at {grid.tensor} x {grid.pipeline}"


class RankedExecutor:
    """Forwards every call to all ranks and returns the answering one's result.

    `token_seconds`: what each of a call's tokens may take before a rank counts as hung.
    """

    def __init__(
        self, ranks: Ranks, limits: Limits, device: str, token_seconds: float = TOKEN
    ) -> None:
        self.limits, self.device = limits, device
        self._ranks, self._token_seconds = ranks, token_seconds

    def step(self, batch: Batch) -> StepResult:
        """See `Executor.step`."""
        result: StepResult = self._call("step", batch, _tokens(batch))
        return result

    def logits(self, batch: Batch) -> Tensor:
        """See `Executor.logits`."""
        result: Tensor = self._call("logits", batch, _tokens(batch))
        return result

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """See `Executor.encode`."""
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        result: tuple[Tensor, Tensor | None] = self._call("encode", prompts, tokens)
        return result

    def score(self, passages: Sequence[Passage]) -> Tensor:
        """See `Executor.score`."""
        tokens = sum(len(p.token_ids) + len(p.encoder_ids or ()) for p in passages)
        result: Tensor = self._call("score", passages, tokens)
        return result

    def close(self) -> None:
        """End the ranks."""
        self._ranks.close()

    def _call(self, method: str, argument: object, tokens: int) -> Any:
        return self._ranks.call(method, argument, still=tokens * self._token_seconds)


def _tokens(batch: Batch) -> int:
    """How many tokens a step computes."""
    rows = sum(len(row.token_ids) for row in batch.rows)
    return rows + sum(len(prompt.token_ids) for prompt in batch.prompts)
