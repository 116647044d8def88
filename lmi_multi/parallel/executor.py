"""An executor whose ranks live in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lmi_multi.backends.base import Executor, Limits
from lmi_multi.engine.batch import Batch, Passage, Prompt, StepResult
from lmi_multi.parallel.ranks import RankGroup


class RankedExecutor:
    """Forwards every call to all ranks and returns rank 0's answer."""

    def __init__(
        self,
        size: int,
        build: Callable[[int, int], Executor],
        limits: Limits,
        device: str,
        process_group: str = "gloo",
    ) -> None:
        self.limits, self.device = limits, device
        self._ranks = RankGroup(size, build, process_group)

    def step(self, batch: Batch) -> StepResult:
        """See `Executor.step`."""
        result: StepResult = self._ranks.call("step", batch)
        return result

    def logits(self, batch: Batch) -> Tensor:
        """See `Executor.logits`."""
        result: Tensor = self._ranks.call("logits", batch)
        return result

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """See `Executor.encode`."""
        result: tuple[Tensor, Tensor | None] = self._ranks.call("encode", prompts)
        return result

    def score(self, passages: Sequence[Passage]) -> Tensor:
        """See `Executor.score`."""
        result: Tensor = self._ranks.call("score", passages)
        return result

    def close(self) -> None:
        """End the ranks."""
        self._ranks.close()
