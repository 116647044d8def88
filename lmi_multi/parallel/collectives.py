"""What ranks say to each other inside a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lmi_multi import progress
from lmi_multi.parallel.pipeline import OneStage, Pipeline

_ONE_STAGE = OneStage()
# Into one tensor; torch 2.13 has renamed it.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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

    @property
    def alone(self) -> bool:
        """Whether there is nobody to exchange anything with: nothing needs to be called then."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x; same shape and dtype on every rank. x may be overwritten."""

    def add_reduced(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """residual + (the sum of every rank's x + bias): x and residual [tokens, features], which
        may be overwritten, bias [features]."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x [..., n], concatenated in rank order: [..., size * n]."""


class Near(Protocol):
    """A faster way between ranks that are near each other."""

    def sum(self, x: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> bool:
        """Make x the sum of every rank's; or, if there is a residual, make that what
        `Collectives.add_reduced` says. False, with nothing done, if it does not cover them; as all
        ranks' have the same shapes and types, they all say the same."""

    def check(self) -> None:
        """See `Peers.check`."""


class Peers(Collectives, Protocol):
    """Collectives of ranks that capture their steps together, and go on by themselves."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold what they exchange."""

    @property
    def near(self) -> Near | None:
        """A faster way to them, if there is one."""

    @property
    def silent(self) -> bool:
        """Whether this is within `muted`."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, which has the same shape and dtype on every rank; x is overwritten."""

    def least(self, number: int) -> int:
        """The least of every rank's numbers; the host waits for it. No graph can hold this."""

    def muted(self) -> AbstractContextManager[None]:
        """Within it tensors take the shapes and the memory that they would, and nothing is
        exchanged; but for `least`."""

    def check(self) -> None:
        """Raises RankError if what was exchanged until now is wrong, as far as the device has
        come. The host does not wait."""


class SingleRank:
    """One rank that holds its layers whole: nothing to exchange."""

    rank = 0
    size = 1
    alone = capturable = True
    near: Near | None = None
    silent = False

    def __init__(self, pipeline: Pipeline = _ONE_STAGE) -> None:
        self.pipeline = pipeline

    def all_reduce(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def add_reduced(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Collectives.add_reduced`."""
        return residual + (x if bias is None else x + bias)

    def all_gather(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def least(self, number: int) -> int:
        """The number itself."""
        return number

    def muted(self) -> AbstractContextManager[None]:
        """Nothing changes."""
        return nullcontext()

    def check(self) -> None:
        """Nothing can be wrong."""


class TorchCollectives:
    """Collectives of a torch.distributed process group (gloo or NCCL); None: the default one.

    With NCCL the device is torch's current one. What `near` covers goes that way.
    """

    alone = False
    near: Near | None = None

    def __init__(
        self, group: dist.ProcessGroup | None = None, pipeline: Pipeline = _ONE_STAGE
    ) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.pipeline = pipeline
        self._group = group
        gloo = dist.get_backend(group) == "gloo"
        self.capturable = not gloo  # its messages are the host's affair
        self._wide = gloo  # it adds half types in their own precision: sum in float32 there
        self._device = torch.device("cpu" if gloo else "cuda")
        self.silent = False

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in float32 where the library would round between additions."""
        if self.near is not None and not self.silent and self.near.sum(x):
            return x
        total = x.float() if self._wide else x
        if not self.silent:
            with progress.waiting():
                dist.all_reduce(total, group=self._group)
        return total.to(x.dtype)

    def add_reduced(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Collectives.add_reduced`."""
        if self.near is not None and not self.silent and self.near.sum(x, residual, bias):
            return residual
        total = self.all_reduce(x)
        return residual + (total if bias is None else total + bias)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate along the last dimension in rank order."""
        parts = x.new_empty((self.size, *x.shape))
        if self.silent:
            parts.copy_(x)
        else:
            with progress.waiting():
                _gather(parts.flatten(0, 1), x.contiguous(), self._group)
        return parts.movedim(0, -2).flatten(-2)

    def broadcast(self, x: Tensor) -> Tensor:
        """See `Peers.broadcast`."""
        if not self.silent:
            with progress.waiting():
                dist.broadcast(x, group=self._group, group_src=0)
        return x

    def least(self, number: int) -> int:
        """See `Peers.least`."""
        own = torch.tensor([number], dtype=torch.int64, device=self._device)
        with progress.waiting():
            dist.all_reduce(own, dist.ReduceOp.MIN, self._group)
            return int(own.item())

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, which can be pickled, in rank order."""
        every: list[Any] = [None] * self.size
        with progress.waiting():
            dist.all_gather_object(every, value, self._group)
        return every

    def check(self) -> None:
        """See `Peers.check`."""
        if self.near is not None:
            self.near.check()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """See `Peers.muted`."""
        self.silent = True
        try:
            yield
        finally:
            self.silent = False
