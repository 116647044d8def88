"""What the stages of a pipeline hand to each other inside a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from lmi_multi import progress
from lmi_multi.models.stages import Stage


class Pipeline(Protocol):
    """One rank's stage, and the ranks of the other stages that hold the same slices."""

    @property
    def stage(self) -> Stage | None:
        """What this rank holds; None: the whole network."""

    @property
    def first(self) -> bool:
        """Whether this stage embeds."""

    @property
    def last(self) -> bool:
        """Whether this stage draws."""

    def send(self, x: Tensor) -> None:
        """Hand x to the next stage."""

    def receive(self, x: Tensor) -> Tensor:
        """What the stage before sends, in x, which has its shape and dtype."""

    def share(self, x: Tensor) -> Tensor:
        """The last stage's x; same shape and dtype on every stage."""


class OneStage:
    """A pipeline of one stage: nothing to hand over."""

    stage = None
    first = last = True

    def send(self, x: Tensor) -> None:
        """Raises ValueError: no stage follows."""
        raise ValueError("the last stage sends nothing")

    def receive(self, x: Tensor) -> Tensor:
        """Raises ValueError: no stage comes before."""
        raise ValueError("the first stage receives nothing")

    def share(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class TorchPipeline:
    """Point-to-point messages of torch.distributed (gloo or NCCL).

    `ranks` are the global ranks of all stages, in order; they are the members of `group`.
    """

    def __init__(self, stage: Stage, ranks: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self.stage, self.first, self.last = stage, stage.first, stage.last
        self._ranks, self._group = list(ranks), group

    def send(self, x: Tensor) -> None:
        """See `Pipeline.send`."""
        with progress.waiting():
            dist.send(x.contiguous(), self._ranks[self.stage.index + 1], self._group)

    def receive(self, x: Tensor) -> Tensor:
        """See `Pipeline.receive`."""
        with progress.waiting():
            dist.recv(x, self._ranks[self.stage.index - 1], self._group)
        return x

    def share(self, x: Tensor) -> Tensor:
        """See `Pipeline.share`. Other stages' x is overwritten."""
        x = x.contiguous()
        with progress.waiting():
            dist.broadcast(x, self._ranks[-1], self._group)
        return x
