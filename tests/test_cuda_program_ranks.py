"""Step programs of several ranks, which wait for each other's sums: against the same steps kernel
by kernel, and against the CPU.

Processes on one GPU, which take turns on it, and on two. How ranks agree on programs is in
test_cuda_programs_together.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda.program import FUSED_NORM_ROWS
from torch import Tensor

from benchmarks.random_model import random_model
from benchmarks.shapes import Shape
from lmi_multi.errors import RankError
from lmi_multi.model import Model
from lmi_multi.parallel.local import LocalRanks
from tests import test_cuda_all_reduce, test_cuda_program, test_cuda_ranks, tiny_models
from tests.matrix import SharedRanks
from tests.test_cuda_graphs import LIMITS as TINY_LIMITS
from tests.test_cuda_graphs import assert_same_as_cpu, cpu_model, prompts
from tests.test_cuda_program import LIMITS, TOLERANCE, arrange, logits, need_programs
from tests.test_cuda_ranks import FAULTS, assert_noticed, need

pytestmark = pytest.mark.cuda

ROWS = (1, 2, 4, 7, 8, 9)  # of nine there is no program
SHAPES = test_cuda_program.SHAPES | {
    "wide": Shape(  # more features than a block's threads stage in one turn
        "LlamaForCausalLM",
        "LlamaConfig",
        {"hidden_size": 5120, "num_hidden_layers": 2, "num_attention_heads": 40}
        | {"num_key_value_heads": 8, "intermediate_size": 2752, "vocab_size": 999},
    ),
}
WIDTHS = {
    **{"flan": 1024, "gptj": 2048, "gpt2": 768, "neox": 768, "opt-350m": 1024},
    **{"llama-gqa": 1024, "wide": 5120},
}
ATTENTIONS = {
    **{"flan": 4, "gptj": 2, "gpt2": 3, "neox": 3, "opt-350m": 3},
    **{"llama-gqa": 3, "wide": 2},
}
MOST_TAKEN = 64 << 10  # bytes of a sum's words up to which products take them themselves
MOST_HANDED = 8192  # results up to which attention hands them over


class Capturable(test_cuda_all_reduce.ThroughHost):
    """What a step exchanges goes through the GPUs' memory: a graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.capturable = True

    def all_gather(self, x: Tensor) -> Tensor:
        # Beside zeros: exact. In float32, whose pieces are whole ones even for three ranks.
        parts = x.new_zeros((self.size, *x.shape), dtype=torch.float32)
        parts[self.rank] = x
        if not self.silent:
            assert self.near is not None and self.near.sum(parts)
        return parts.movedim(0, -2).flatten(-2).to(x.dtype)


class Shelf(test_cuda_all_reduce.Shelf):
    """A rank on a GPU; its methods are the tests, and say what they have found."""

    def __init__(self, gpus: int, rank: int, size: int) -> None:
        super().__init__(gpus, rank, size)
        self.peers: Any = Capturable()

    def opened(
        self, shape: str, dtype: Any, quantize: Any, program_rows: int, nothing: bool = False
    ) -> Any:
        """As in test_cuda_program.py, but every rank has slices of its own; `nothing`: all that is
        summed is zero."""
        from lmi_multi.backends.cuda.executor import CudaExecutor
        from lmi_multi.backends.cuda.ops import Scratch

        kind = SHAPES[shape], dtype, quantize
        _, whole = random_model(*kind, torch.device("meta"))
        spec, tensors = random_model(*kind, self.device, self.size)
        for name, tensor in tensors.items():
            if name.endswith("scale"):  # weights as large as others: with larger ones attention is
                tensor.div_(20)  # all to one key, and which, the last bit of a sum may decide
            if nothing and ("out." in name or "down." in name):
                tensor.zero_()
            if self.rank and tensor.shape != whole[name].shape:
                plain = tensor.view(torch.int8) if tensor.itemsize == 1 else tensor
                plain.copy_(plain.flip(0))
        scratch = Scratch(self.device, LIMITS.max_batch * spec.heads)
        executor = CudaExecutor(
            spec, tensors, LIMITS, scratch, self.peers, program_rows=program_rows
        )
        torch.manual_seed(1 + self.rank)
        for kept in (*executor._cache.k, *executor._cache.v):
            kept.normal_()
        return executor

    @torch.inference_mode()
    def compare(
        self, shape: str, dtype: str, quantize: str | None, nothing: bool = False
    ) -> dict[str, Any]:
        """How far logits of programs are from those of single kernels, at most; whether ranks have
        the same bits; of how many rows there are programs, and what waits in them."""
        ours, theirs = (self.opened(shape, dtype, quantize, rows, nothing) for rows in (8, 0))
        errors, own = [], []
        for rows in ROWS:
            found, expected = logits(ours, rows, 3), logits(theirs, rows, 3)
            own += found
            errors += [
                ((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)
            ]
        self.peers.check()
        every = self.peers.exchange([tensor.cpu() for tensor in own])
        return {
            "error": max(errors),
            "alike": all(
                torch.equal(a, b) for own in every[1:] for a, b in zip(every[0], own, strict=True)
            ),
            "programs": sorted(size for size, made in ours._fed._programs.items() if made),
            "waits": {size: waits(made) for size, made in ours._fed._programs.items() if made},
            "counters": ours._fed._scratch.counters.any().item(),
        }

    @torch.inference_mode()
    def many(self, count: int) -> float:
        """Programs of changing rows and sums by the other kernel one after another, while ranks run
        ahead of each other by turns; how far off the worst logits are."""
        ours, theirs = (self.opened("llama-gqa", "bf16", None, rows) for rows in (8, 0))
        steps, expected = {}, {}
        for rows in (1, 2, 4, 8):
            steps[rows], other = ours._fed.logits(rows), theirs._fed.logits(rows)
            arrange(theirs, 0)
            expected[rows] = other.replay()[:rows].clone()
        arrange(ours, 0)
        chance, worst = random.Random(5), torch.zeros((), device=self.device)
        totals = []
        for number in range(count):
            rows, sums = chance.choice((1, 2, 4, 8)), chance.random() < 0.3
            if chance.random() < 0.1 and number % self.size == self.rank:
                torch.cuda._sleep(1_000_000)
            if sums:
                x = torch.full((1024,), self.rank + 1.0, device=self.device)
                assert self.peers.near.sum(x)
                totals.append(x.sum())
            found = steps[rows].replay()[:rows]
            error = (found - expected[rows]).norm() / expected[rows].norm()
            worst = torch.maximum(worst, error.nan_to_num(torch.inf))
        self.peers.check()
        expected_total = 1024 * self.size * (self.size + 1) / 2
        assert all(total.item() == expected_total for total in totals)
        return float(worst.item())

    @torch.inference_mode()
    def late(self) -> tuple[str, float]:
        """Rank 1 does not come: what rank 0 says, and after how long, with more programs behind."""
        ours = self.opened("llama-gqa", "bf16", None, 8)
        self.agree(True)
        said, began = "", time.monotonic()
        if self.rank == 0:
            self.peers.near.seconds = 1.0
            program = ours._fed._programs[1]
            assert program is not None
            for _ in range(10):
                program.run()
            torch.cuda.synchronize()
            try:
                self.peers.check()
            except RankError as error:
                said = str(error)
        return said, time.monotonic() - began


def waits(program: Any) -> tuple[int, int, int]:
    """How many sums a program has; how many of these products take, whose phases are gone; and how
    many attentions hand their results over: as `Program` of csrc/step.h has it."""
    made = program._program
    phases, _, sums, _, hands = made[0].view(torch.int32)[3:8].tolist()
    return sums, (len(made) - 1) // 2 - phases, hands


def taken(shape: str, dtype: str, rows: int, count: int, ranks: int) -> int:
    """Of so many sums those that products take: all behind which a norm and a product come."""
    if dtype == "fp32" or shape == "opt-350m" or rows > FUSED_NORM_ROWS:
        return 0
    if rows * WIDTHS[shape] * ranks * 4 > MOST_TAKEN:
        return 0
    return (count // 2 if shape == "neox" else count) - 1  # NeoX: two sums a layer, one behind both


def handed(shape: str, dtype: str, rows: int, ranks: int) -> int:
    """Attentions that hand their results over: all but the last."""
    if dtype == "fp32" or rows * WIDTHS[shape] // ranks > MOST_HANDED:
        return 0
    return ATTENTIONS[shape] - 1


@contextmanager
def opened_group(count: int, gpus: int) -> Iterator[LocalRanks]:
    need(gpus, kernels=True, near=True)
    need_programs()
    opened = LocalRanks(count, partial(Shelf, gpus))
    assert opened.call("connect"), "see the log of the ranks: why not"
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=[(2, 2), (2, 1)], ids="{0[0]}-on-{0[1]}".format)
def group(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with opened_group(*request.param) as opened:
        yield opened


def assert_right(found: dict[str, Any], shape: str, dtype: str, ranks: int) -> None:
    assert found["error"] < TOLERANCE[dtype], found
    assert found["alike"] and not found["counters"]
    assert found["programs"] == [1, 2, 4, 8]  # none was refused
    expected = {
        rows: (sums, taken(shape, dtype, rows, sums, ranks), handed(shape, dtype, rows, ranks))
        for rows, (sums, _, _) in found["waits"].items()
    }
    assert found["waits"] == expected


CASES = [
    *((shape, "bf16", None) for shape in ("llama-gqa", "flan", "gptj", "neox", "opt-350m")),
    *((shape, "fp32", None) for shape in ("llama-gqa", "flan", "gptj", "bloom")),
    *(("gptj", "fp16", None), ("flan", "bf16", "int8"), ("gptj", "fp16", "fp8")),
    *(("gpt2", "fp32", "int8"), ("gpt2", "bf16", None), ("wide", "bf16", None)),
]


@pytest.mark.parametrize(("shape", "dtype", "quantize"), CASES)
def test_logits_are_those_of_single_kernels(
    group: LocalRanks, shape: str, dtype: str, quantize: str | None
) -> None:
    """Those round partial sums to the activations' type; programs do not."""
    assert_right(group.call("compare", shape, dtype, quantize), shape, dtype, 2)


@pytest.mark.parametrize("shape", ["flan", "gptj"])
def test_sums_of_nothing(group: LocalRanks, shape: str) -> None:
    """Zeros are words like others."""
    assert_right(group.call("compare", shape, "bf16", None, True), shape, "bf16", 2)


@pytest.mark.parametrize(
    ("count", "gpus", "shapes"), [(4, 2, ("flan", "gptj", "llama-gqa")), (3, 1, ("gpt2",))]
)
def test_more_ranks(count: int, gpus: int, shapes: tuple[str, ...]) -> None:
    with opened_group(count, gpus) as opened:
        for shape in shapes:
            assert_right(opened.call("compare", shape, "bf16", None), shape, "bf16", count)


def test_many_programs(group: LocalRanks) -> None:
    assert group.call("many", 400) < TOLERANCE["bf16"]


def test_a_peer_that_does_not_come(group: LocalRanks) -> None:
    """The last one of its group: what failed once stays so."""
    said, seconds = group.call("late")
    assert said == "rank 0 waited for another GPU's part of a sum for 1 s"
    assert 1 <= seconds < 10  # not a second for each of sixty sums


# --- over NCCL


class Programs(test_cuda_ranks.Shelf):
    """A rank whose steps are programs, however small its products are."""

    program_rows = 8

    def programs(self) -> list[bool]:
        opened: Any = self.executor
        made = [*opened._fed._programs.values(), *opened._ahead._graphs._programs.values()]
        return [program is not None for program in made]


@pytest.fixture(scope="module")
def ranks() -> Iterator[LocalRanks]:
    yield from opened_ranks()


@pytest.fixture
def own_ranks() -> Iterator[LocalRanks]:
    """Of which one may be killed."""
    yield from opened_ranks()


def opened_ranks() -> Iterator[LocalRanks]:
    need(2, kernels=True, near=True)
    need_programs()
    opened = LocalRanks(2, partial(Programs, True), "nccl")
    yield opened
    opened.close()


def opened_model(ranks: LocalRanks, checkpoints: Path, family: str) -> Model:
    artifact = tiny_models.artifact(checkpoints, family)
    return Model(artifact, "cuda", SharedRanks(ranks, artifact.folder, TINY_LIMITS))


@pytest.mark.parametrize("family", ["t5", "bloom", "gptj", "llama", "qwen2"])
def test_tokens_are_those_of_the_cpu(ranks: LocalRanks, checkpoints: Path, family: str) -> None:
    """Greedy, sampled and searches, rows that come and go, and prefills between."""
    assert_same_as_cpu(checkpoints, family, opened_model(ranks, checkpoints, family))
    made = ranks.call("programs")
    assert len(made) > 3 and all(made)
    own = prompts(4, 6)  # several greedy rows, and nothing else
    with cpu_model(checkpoints, family) as cpu:
        expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=9)]
    with opened_model(ranks, checkpoints, family) as model:
        assert [c.token_ids for c in model.generate(own, max_new_tokens=9)] == expected


@FAULTS
def test_a_rank_that_fails(
    monkeypatch: pytest.MonkeyPatch,
    own_ranks: LocalRanks,
    checkpoints: Path,
    sent: int,
    message: str,
    seconds: float,
) -> None:
    """While the other one's GPU waits for it in a program. When the call fails, both are gone,
    which the driver takes its time for."""
    model = opened_model(own_ranks, checkpoints, "llama")
    assert all(own_ranks.call("programs"))
    assert_noticed(monkeypatch, model, own_ranks, 55, sent, message, seconds)
