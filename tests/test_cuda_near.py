"""Whether ranks sum through each other's memory: all of them or none, over Gloo and without GPUs.

The memory and the kernel are stood in for; test_cuda_all_reduce.py has the real ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lmi_multi.backends.cuda import near
from torch import Tensor

from lmi_multi.errors import RankError
from lmi_multi.parallel.collectives import TorchCollectives
from lmi_multi.parallel.local import LocalRanks

TROUBLED = 1


class Shelf:
    """Connects in every rank, each time with other trouble on one."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def connect(self, trouble: Callable[[Shelf], None] | None) -> list[tuple[bool, str]]:
        """Whether there is a near way, and what the log says, of every rank."""
        self.patch = pytest.MonkeyPatch()
        self.device = torch.device("cpu", 0)
        self.kernels = SimpleNamespace(
            make_inbox=self.make_inbox, open_inbox=self.open_inbox, all_reduce=self.all_reduce
        )
        self.patch.setattr(torch.ops, "lmi_multi", self.kernels, raising=False)
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.patch.setattr(near, "host_flag", lambda: self.flag)
        self.patch.setattr(torch.cuda, "device_count", lambda: 2)
        self.patch.setattr(torch.cuda, "can_device_access_peer", lambda *_: False)
        if trouble is not None and self.rank == TROUBLED:
            trouble(self)
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(  # type: ignore[method-assign]
            f"{record.levelname}: {record.getMessage()}"
        )
        near.log.setLevel(logging.INFO)
        near.log.addHandler(handler)
        peers = TorchCollectives()
        near.connect_memory(peers, self.device)
        near.log.removeHandler(handler)
        if peers.near is not None:
            self.use(peers)
        every = peers.exchange((peers.near is not None, "\n".join(said)))
        self.patch.undo()
        return every

    def make_inbox(self, handle: Tensor, device: int) -> int:
        handle[:] = self.rank + 1
        return 100 + self.rank

    def open_inbox(self, handle: Tensor, device: int) -> int:
        return 100 + int(handle[63]) - 1

    def all_reduce(
        self, x: Tensor, residual: Tensor | None, bias: Tensor | None, inboxes: Tensor, rank: int,
        patience: int, _: Tensor,
    ) -> bool:  # fmt: skip
        assert inboxes.tolist() == [100 + r for r in range(self.size)]
        assert rank == self.rank
        assert patience in (10 * 10**9, 60 * 10**9)
        if x.nbytes > 2**18:
            return False
        total = x.float()
        dist.all_reduce(total)
        if residual is None:
            x.copy_(total)
        else:
            assert bias is not None
            residual += total + bias
        return True

    def use(self, peers: TorchCollectives) -> None:
        """Small sums go that way, large ones do not, and none does while ranks are muted."""
        calls: list[int] = []

        def noted(x: Tensor, *others: Any) -> bool:
            calls.append(x.nbytes)
            return self.all_reduce(x, *others)

        self.kernels.all_reduce = noted
        for elements in (4, 2**17):
            found = peers.all_reduce(torch.full((elements,), self.rank + 0.5))
            assert found.tolist() == [sum(r + 0.5 for r in range(self.size))] * elements
        assert calls == [16, 2**19]
        for rows in (2, 2**16):
            x = torch.full((rows, 2), self.rank + 0.5)
            residual, bias = torch.tensor([[10.0, 20.0]] * rows), torch.tensor([1.0, 2.0])
            total = peers.add_reduced(residual, x, bias)
            assert total.tolist() == [[13, 24]] * rows
        assert calls[2:4] == [16, 2**19]
        calls.clear()
        with peers.muted():
            assert peers.all_reduce(torch.ones(4)).tolist() == [1] * 4
            assert peers.add_reduced(torch.ones(1, 2), torch.ones(1, 2), None).tolist() == [[2, 2]]
        assert not calls
        peers.check()
        self.flag[0] = 1
        with pytest.raises(
            RankError, match=f"rank {self.rank} waited for another GPU's part .* 60"
        ):
            peers.check()


@pytest.fixture(scope="module")
def two() -> Iterator[LocalRanks]:
    opened = LocalRanks(2, Shelf)
    yield opened
    opened.close()


def test_ranks_that_can(two: LocalRanks) -> None:
    said = "INFO: rank {}: sums of up to 256 KiB go through the GPUs' memory"
    assert two.call("connect", None) == [(True, said.format(0)), (True, said.format(1))]


def other_host(shelf: Shelf) -> None:
    shelf.patch.setattr(near, "_host", lambda: "elsewhere")


def other_device(shelf: Shelf) -> None:
    shelf.device = torch.device("cpu", 1)


def switched_off(shelf: Shelf) -> None:
    shelf.patch.setenv(near.SWITCH, "0")


def cannot(name: str) -> Callable[[Shelf], None]:
    return Cannot(name)


class Cannot:
    """The kernels' function of this name raises."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, shelf: Shelf) -> None:
        def refuse(*_: Any) -> int:
            raise RuntimeError(f"{self.name}: not here\nmore")

        setattr(shelf.kernels, self.name, refuse)


def wrong_sum(shelf: Shelf) -> None:
    right = shelf.all_reduce

    def wrong(x: Tensor, *others: Any) -> bool:
        done = right(x, *others)
        if len(x) == 5124 and x.dtype == torch.float16:
            x[5123] += 1
        return done

    shelf.kernels.all_reduce = wrong


def no_launch(shelf: Shelf) -> None:
    right = shelf.all_reduce

    def refuse(x: Tensor, *others: Any) -> bool:
        right(x.clone(), *others)  # the other rank gets its part all the same: over Gloo it waits
        raise RuntimeError("launch: not here\nmore")

    shelf.kernels.all_reduce = refuse


def late_peer(shelf: Shelf) -> None:
    right = shelf.all_reduce

    def late(x: Tensor, *others: Any) -> bool:
        shelf.flag[0] = 1
        return right(x, *others)

    shelf.kernels.all_reduce = late


OTHER = "another rank has found a reason"


@pytest.mark.parametrize(
    ("trouble", "level", "first", "second"),
    [
        (other_host, "INFO", "rank 1 is on another host", "rank 0 is on another host"),
        (
            other_device,
            "INFO",
            "cuda:0 cannot access the memory of cuda:1",
            "cuda:1 cannot access the memory of cuda:0",
        ),
        (
            switched_off,
            "INFO",
            "rank 1: switched off (LMI_MULTI_CUDA_PEER_MEMORY=0)",
            "rank 1: switched off (LMI_MULTI_CUDA_PEER_MEMORY=0)",
        ),
        (
            cannot("make_inbox"),
            "INFO",
            "rank 1: make_inbox: not here",
            "rank 1: make_inbox: not here",
        ),
        (cannot("open_inbox"), "INFO", OTHER, "open_inbox: not here"),
        (
            wrong_sum,
            "WARNING",
            OTHER,
            "these came out differently: " + ", ".join(["5124 elements of torch.float16"] * 3),
        ),
        (no_launch, "WARNING", OTHER, "launch: not here"),
        (late_peer, "WARNING", OTHER, "rank 1 waited for another GPU's part of a sum for 10 s"),
    ],
)
def test_ranks_of_which_one_cannot(
    two: LocalRanks, trouble: Callable[[Shelf], None], level: str, first: str, second: str
) -> None:
    """None of them does, and each says why."""
    assert two.call("connect", trouble) == [
        (False, f"{level}: rank {rank}: all sums go through NCCL: {reason}")
        for rank, reason in enumerate((first, second))
    ]
