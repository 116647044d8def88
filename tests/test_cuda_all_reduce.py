"""The sum over peer memory: two and four processes on one GPU, which take turns on it, and two on
two."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lmi_multi.errors import RankError
from lmi_multi.parallel.collectives import TorchCollectives
from lmi_multi.parallel.local import LocalRanks
from tests.test_cuda_ranks import need

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST = 2**18  # bytes


class ThroughHost(TorchCollectives):
    """Gloo's, as NCCL takes no two ranks on one GPU."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(x) if self.near else x.copy_(super().all_reduce(x.cpu()))


def part(rank: int, number: int, elements: int, dtype: torch.dtype) -> Tensor:
    """What a rank adds to a sum, which the others can make as well."""
    chance = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(elements, generator=chance).to(dtype)


class Shelf:
    """A rank on a GPU; its methods are the tests, and say what they have found."""

    def __init__(self, gpus: int, rank: int, size: int) -> None:
        from lmi_multi.backends.cuda.kernels import missing

        logging.basicConfig(level=logging.INFO)  # whether sums go over peer memory, or why not
        assert not missing()
        self.rank, self.size = rank, size
        self.device = torch.device("cuda", rank % gpus)
        torch.cuda.set_device(self.device)
        self.peers = ThroughHost()

    def connect(self) -> bool:
        from lmi_multi.backends.cuda.near import connect_memory

        connect_memory(self.peers, self.device)
        return all(self.peers.exchange(self.peers.near is not None))

    def expected(self, number: int, elements: int, dtype: torch.dtype) -> Tensor:
        total = torch.zeros(elements)
        for rank in range(self.size):
            total += part(rank, number, elements, dtype).float()
        return total.to(dtype)

    def agree(self, *right: bool) -> bool:
        self.peers.check()
        return all(self.peers.exchange(all(right)))

    def sums(self) -> bool:
        """Of every type and size: the bits of a sum in float32 in the order of ranks."""
        right = []
        for number, elements in enumerate((2, 4, 6, 1022, 1024, 1026, 8192, 40_000, 65_536)):
            for dtype in DTYPES:
                x = part(self.rank, number, elements, dtype).to(self.device)
                assert self.peers.near and self.peers.near.sum(x)
                right.append(torch.equal(x.cpu(), self.expected(number, elements, dtype)))
        return self.agree(*right)

    def residuals(self) -> bool:
        """residual + (sum + bias), in float32 and rounded once; with no bias, and with residuals of
        another type."""
        assert self.peers.near is not None
        right = []
        for number, (rows, features) in enumerate(((1, 2), (1, 768), (7, 1022), (16, 4096))):
            for dtype, wide in ((d, w) for d in DTYPES for w in (d, torch.float32)):
                for biased in (True, False):
                    x = part(self.rank, number, rows * features, dtype).view(rows, features)
                    residual = part(7, number, rows * features, wide).view(rows, features)
                    bias = part(8, number, features, dtype)
                    total = torch.zeros(rows, features)
                    for rank in range(self.size):
                        total += part(rank, number, rows * features, dtype).view_as(x).float()
                    total = total + bias.float() if biased else total
                    expected = (residual.float() + total).to(wide)
                    found = residual.to(self.device)
                    own = bias.to(self.device) if biased else None
                    assert self.peers.near.sum(x.to(self.device), found, own)
                    right.append(torch.equal(found.cpu(), expected))
        return self.agree(*right)

    def refused(self) -> list[bool]:
        """What the kernel does not cover: nothing is done then, so one rank can ask alone."""
        near = self.peers.near
        assert near is not None
        others = [
            torch.ones(MOST // 4 + 1, device=self.device),
            torch.ones(3, dtype=torch.float16, device=self.device),
            torch.ones(9, dtype=torch.bfloat16, device=self.device)[1:],
            torch.ones(8, 8, device=self.device).t()[1:],
            torch.ones(8, dtype=torch.float64, device=self.device),
            torch.ones(0, device=self.device),
        ]
        x, odd = others[0][:6].clone(), torch.ones(3, dtype=torch.float16, device=self.device)
        return [
            *(near.sum(x) for x in others),
            near.sum(x, x[:4].clone()),  # residual of another size
            near.sum(x, None, x.clone()),  # bias without residual
            near.sum(x, x.clone(), x[:4].clone()),  # no whole rows
            near.sum(x.half(), x.half(), odd),  # a word would be of two rows
        ]

    def many(self, count: int) -> bool:
        """One after another of changing sizes, while ranks run ahead of each other by turns."""
        assert self.peers.near is not None
        chance, made = random.Random(5), []
        for number in range(count):
            elements = 2 * chance.choice((1, 200, 512, 513, 4096, 20_000))
            dtype, sleeps = chance.choice(DTYPES), chance.random() < 0.1
            x = part(self.rank, number, elements, dtype).to(self.device)
            if sleeps and number % self.size == self.rank:
                torch.cuda._sleep(1_000_000)
            assert self.peers.near.sum(x)
            made.append((x, number, elements, dtype))
        return self.agree(*(torch.equal(x.cpu(), self.expected(*own)) for x, *own in made))

    def choices(self, count: int) -> bool:
        """The likeliest token of ranks' parts of the logits, while ranks run ahead of each other by
        turns: what one GPU finds in all of them, the lowest of equal ones on different ranks too,
        and of rows that are unusable for what one rank has. Ranks may have no part at all."""
        near: Any = self.peers.near
        chance, right = random.Random(6), []
        for number in range(count):
            rows, vocab = chance.choice(((1, 32128), (5, 1000), (70, 4099), (3, 7), (9, 2)))
            generator = torch.Generator().manual_seed(number)
            logits = torch.randn(rows, vocab, generator=generator).to(chance.choice(DTYPES))
            if rows > 4:
                logits[0], logits[1, vocab // 2] = logits[0].max(), torch.nan
                logits[2], logits[3, vocab // 3] = -torch.inf, torch.inf
            if chance.random() < 0.1 and number % self.size == self.rank:
                torch.cuda._sleep(1_000_000)
            logits = logits.to(self.device)
            share = -(-vocab // self.size)
            first = min(self.rank * share, vocab)
            own, alone = (left_of(rows, self.device) for _ in range(2))
            assert near.choose(logits[:, first : first + share], first, *own, silent=False)
            assert torch.ops.lmi_multi.greedy(logits, *alone)
            torch.cuda.synchronize()
            right += [torch.equal(a, b) for a, b in zip(own[:5], alone[:5], strict=True)]
            right.append(not own[-1].any())
        many = torch.zeros(2049, 8, device=self.device)
        right.append(not near.choose(many, 0, *left_of(2049, self.device), silent=False))
        return self.agree(*right)

    def graph(self, replays: int) -> bool:
        """Three sums in a graph, beside one that is in none."""
        near = self.peers.near
        assert near is not None
        sizes = (4096, 2, 30_000)
        given = [torch.zeros(n, dtype=torch.bfloat16, device=self.device) for n in sizes]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = [x.clone() for x in given]
            assert all(near.sum(x) for x in found)
        right = []
        for number in range(replays):
            for x, n in zip(given, sizes, strict=True):
                x.copy_(part(self.rank, number, n, x.dtype))
            graph.replay()
            alone = part(self.rank, number, 640, torch.float32).to(self.device)
            assert near.sum(alone)
            right += [
                torch.equal(x.cpu(), self.expected(number, n, x.dtype))
                for x, n in ((alone, 640), *zip(found, sizes, strict=True))
            ]
        return self.agree(*right)

    def late(self) -> tuple[str, float]:
        """Rank 1 does not come: what rank 0 says, and after how long, with more sums behind."""
        near: Any = self.peers.near
        said, began = "", time.monotonic()
        if self.rank == 0:
            near.seconds = 1.0
            for _ in range(100):
                assert near.sum(torch.ones(4096, device=self.device))
            scores = torch.ones(1, 8, device=self.device)
            assert near.choose(scores, 0, *left_of(1, self.device), silent=False)
            torch.cuda.synchronize()
            try:
                self.peers.check()
            except RankError as error:
                said = str(error)
        return said, time.monotonic() - began


def left_of(rows: int, device: torch.device) -> list[Tensor]:
    """What `greedy` leaves a step's tokens in, and works with."""
    lengths = torch.arange(rows, dtype=torch.int32, device=device)
    return [
        torch.full((2, rows), -5, device=device),
        torch.full((rows,), -5, device=device),
        *(lengths, lengths % 2, lengths // 2 % 2),
        torch.zeros(32 * max(rows, 64), device=device),
        torch.zeros(max(rows, 64), dtype=torch.int32, device=device),
    ]


@pytest.fixture(scope="module", params=[(2, 1), (4, 1), (2, 2)], ids="{0[0]}-on-{0[1]}".format)
def group(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    count, gpus = request.param
    need(gpus, kernels=True, near=True)
    opened = LocalRanks(count, partial(Shelf, gpus))
    assert opened.call("connect"), "see the log of the ranks: why not"
    yield opened
    opened.close()


def test_sums(group: LocalRanks) -> None:
    assert group.call("sums")


def test_residuals(group: LocalRanks) -> None:
    assert group.call("residuals")


def test_what_is_not_covered(group: LocalRanks) -> None:
    assert group.call("refused") == [False] * 10


def test_many_sums(group: LocalRanks) -> None:
    assert group.call("many", 300)


def test_the_likeliest_token(group: LocalRanks) -> None:
    assert group.call("choices", 200)


def test_in_a_graph(group: LocalRanks) -> None:
    assert group.call("graph", 50)


def test_a_peer_that_does_not_come(group: LocalRanks) -> None:
    """The last one: what failed once stays so."""
    said, seconds = group.call("late")
    assert said == "rank 0 waited for another GPU's part of a sum for 1 s"
    assert 1 <= seconds < 30  # not a second for each of a hundred sums
