"""What ranks say to each other inside a step."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lmi_multi import progress
from lmi_multi.parallel.pipeline import OneStage, Pipeline

_ONE_STAGE = OneStage()


class Collectives(Protocol):
    """Sums and concatenations over the ranks that hold slices of the same layers."""

    @property
    def pipeline(self) -> Pipeline:
        """Which layers these are, and the way to the ranks that hold the others."""

    @property
    def rank(self) -> int:
        """This rank's number, 0 to size - 1."""

    @property
    def size(self) -> int:
        """How many ranks share these layers."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x; same shape and dtype on every rank."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x [..., n], concatenated in rank order: [..., size * n]."""


class SingleRank:
    """One rank that holds its layers whole: nothing to exchange."""

    rank = 0
    size = 1

    def __init__(self, pipeline: Pipeline = _ONE_STAGE) -> None:
        self.pipeline = pipeline

    def all_reduce(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class TorchCollectives:
    """Collectives of a torch.distributed process group (gloo or NCCL); None: the default one."""

    def __init__(
        self, group: dist.ProcessGroup | None = None, pipeline: Pipeline = _ONE_STAGE
    ) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.pipeline = pipeline
        self._group = group
        # gloo adds half types in their own precision: sum in float32 there.
        self._wide = dist.get_backend(group) == "gloo"

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in float32 where the library would round between additions."""
        total = x.float() if self._wide else x.clone()
        if total is x:
            total = x.clone()
        with progress.waiting():
            dist.all_reduce(total, group=self._group)
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate along the last dimension in rank order."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with progress.waiting():
            dist.all_gather(parts, x, self._group)
        return torch.cat(parts, dim=-1)
