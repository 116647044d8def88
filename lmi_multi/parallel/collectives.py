"""What ranks say to each other inside a step."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collectives(Protocol):
    """Sums and concatenations over the ranks of a tensor-parallel group."""

    @property
    def rank(self) -> int:
        """This rank's number, 0 to size - 1."""

    @property
    def size(self) -> int:
        """How many ranks share the model."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x; same shape and dtype on every rank."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x [..., n], concatenated in rank order: [..., size * n]."""


class SingleRank:
    """One rank that holds the whole model: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class TorchCollectives:
    """Collectives of the default torch.distributed process group (gloo or NCCL)."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        # gloo adds half types in their own precision: sum in float32 there.
        self._wide = dist.get_backend() == "gloo"

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in float32 where the library would round between additions."""
        total = x.float() if self._wide else x.clone()
        if total is x:
            total = x.clone()
        dist.all_reduce(total)
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate along the last dimension in rank order."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)
