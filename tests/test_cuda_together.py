"""Ranks that capture steps and run ahead together: two processes over Gloo, with graphs and kernels
stood in for as in test_cuda_ahead.py. The same over NCCL is in test_cuda_ranks.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lmi_multi.backends.cuda import capturing, draws, executor, prefill_graphs, prefill_inputs
from lmi_multi.backends.cuda.ahead import Flight
from lmi_multi.backends.cuda.draws import GREEDY
from lmi_multi.backends.cuda.ops import Scratch
from lmi_multi.backends.cuda.prefill_inputs import LONG, SHORT, Tiling
from lmi_multi.backends.cuda.program import NotCoveredError
from torch import Tensor

from lmi_multi import progress
from lmi_multi.backends import torch_executor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.engine.batch import Draw, Row
from lmi_multi.errors import RankError
from lmi_multi.model import Model
from lmi_multi.parallel.collectives import TorchCollectives
from lmi_multi.parallel.local import LocalRanks
from lmi_multi.parallel.watch import VARIABLE
from tests import tiny_models
from tests.cuda_stand_ins import Replayed, stand_in
from tests.matrix import SharedRanks
from tests.test_cuda_graphs import LIMITS, assert_same_as_cpu, cpu_model, prompts

# One of each kind: relative bias, learned positions, norms behind, ALiBi, parallel blocks, rotary
# positions with one key for all heads, and a window.
FAMILIES = ("t5", "gpt2", "opt-350m", "bloom", "gptj", "llama-mqa-biased-tied", "mistral-window")
TROUBLED = 1  # the rank on which things go wrong


class Capturable(TorchCollectives):
    """Messages over Gloo that a graph can hold, as it is a list of work."""

    def __init__(self) -> None:
        super().__init__()
        self.capturable = True


class Shelf:
    """Lives in every rank, and opens one artifact after another, each with trouble of its own."""

    limits = LIMITS

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.patch = pytest.MonkeyPatch()
        self.programs = stand_in(self.patch)
        self.executor: executor.CudaExecutor | None = None
        self.replays = 0

    def open(self, folder: Path, trouble: Callable[[Shelf], None] | None = None) -> None:
        self.patch.undo()
        self.programs = stand_in(self.patch)
        self.patch.setattr(prefill_inputs, "MANY_KEYS", 8)  # some prompts have more, some have not
        self.count_replays()
        if trouble is not None and self.rank == TROUBLED:
            trouble(self)
        artifact = Artifact.open(folder)
        tensors = artifact.load_rank(self.rank, self.size)
        scratch = Scratch(torch.device("cpu"))
        self.executor = executor.CudaExecutor(
            artifact.spec, tensors, self.limits, scratch, self.peers(), program_rows=8
        )

    def peers(self) -> Capturable:
        return Capturable()

    def count_replays(self, before: Callable[[int], None] = lambda number: None) -> None:
        self.replays = 0

        def replay(own: Replayed, real: Any = Replayed.replay) -> Tensor:
            self.replays += 1
            before(self.replays)
            found: Tensor = real(own)
            return found

        self.patch.setattr(Replayed, "replay", replay)

    def use(self, method: str, *arguments: Any) -> Any:
        return getattr(self.executor, method)(*arguments)

    def programs_run(self) -> int:
        return self.programs.runs

    def parts_are_of_the_whole(self) -> bool:
        """The rank's own logits beside everybody's, with the norm in the head's product and not."""
        assert self.executor is not None
        network, seed = self.executor._network, torch.Generator().manual_seed(1)
        hidden = torch.randn(3, network.spec.hidden, generator=seed)
        own, right = network.own_ids, []
        for head in (network.head, network.norm_head):
            whole, part = head(hidden), head(hidden, whole=False)
            right.append(torch.equal(part, whole[:, own.start : own.stop]))
        return all(right) and 0 < len(own) < network.spec.vocab

    def draws(self) -> tuple[bool, bool]:
        """Whether steps are begun ahead, and draw by rules that read tokens."""
        assert self.executor is not None
        return self.executor.limits.begins_ahead, self.executor.limits.follows

    def prefills(self) -> list[Any]:
        """Of every rank: whether it has the kernel for many keys, and which graphs of prefills."""
        assert self.executor is not None
        graphs = self.executor._prefill_graphs
        assert graphs is not None
        return self.gathered((graphs._long, sorted(graphs._captured)))

    def facts(self) -> list[Any]:
        """Of every rank: its replays, whether it has graphs of prefills, and of which steps it has
        graphs (True) or none for lack of memory (False)."""
        opened = self.executor
        assert opened is not None
        captured = opened._fed._captured if opened._fed else {}
        steps = {size: found is not None for (size, kind), found in captured.items() if not kind}
        return self.gathered((self.replays, opened._prefill_graphs is not None, steps))

    def gathered(self, own: Any) -> list[Any]:
        """What every rank has for its `own`."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, own)
        return every


@pytest.fixture(scope="module")
def two() -> Iterator[LocalRanks]:
    opened = LocalRanks(2, Shelf)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def open_model(
    ranks: LocalRanks, folder: Path, family: str, trouble: Callable[[Shelf], None] | None = None
) -> Model:
    artifact = tiny_models.artifact(folder, family)
    shared = SharedRanks(ranks, artifact.folder, LIMITS)
    if trouble is not None:
        ranks.call("open", artifact.folder, trouble)
    return Model(artifact, "cuda", shared)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_one_process(two: LocalRanks, folder: Path, family: str) -> None:
    """Every kind of draw, more prompts than rows, so that rows come and go."""
    assert_same_as_cpu(folder, family, open_model(two, folder, family))
    (replays, prefills, steps), other = two.call("facts")
    assert other == (replays, prefills, steps)
    assert replays > 50 and prefills and all(steps.values())
    assert two.call("programs_run") == 0  # none waits for what is not sent through memory
    assert two.call("draws") == (True, False)


@pytest.mark.parametrize("family", ["t5", "opt-350m", "bloom"])
def test_a_ranks_own_logits(two: LocalRanks, folder: Path, family: str) -> None:
    """Separate and tied heads, and a projection before one."""
    open_model(two, folder, family)
    assert two.call("parts_are_of_the_whole")


# --- trouble on one rank


def no_memory(*numbers: int) -> Callable[[Shelf], None]:
    """The captures of these numbers, from 1, fail; all where none is given."""
    return SomeCaptures(numbers, torch.OutOfMemoryError)


class SomeCaptures:
    """Captures of some numbers raise: behind their run before, which all ranks take part in."""

    def __init__(self, numbers: tuple[int, ...], error: type[Exception]) -> None:
        self.numbers, self.error = numbers, error

    def __call__(self, shelf: Shelf) -> None:
        calls = [0]

        def capture(body: Callable[[], Tensor], *_: Any) -> Replayed:
            calls[0] += 1
            captured = Replayed(body)
            if not self.numbers or calls[0] in self.numbers:
                raise self.error("no room")
            return captured

        shelf.patch.setattr(capturing, "capture", capture)


@pytest.mark.parametrize(
    ("numbers", "missing"), [((1,), 1), ((2,), 1), ((3,), 12), ((4,), 12), ((), None)]
)
def test_memory_is_short_on_one(
    two: LocalRanks, folder: Path, numbers: tuple[int, ...], missing: int | None
) -> None:
    """Before the others' messages are captured, or while they are: no rank has that graph then.
    Two captures for each size, one of them without messages; the sizes 1 and 12 come first."""
    _, _, steps = facts_beside_cpu(two, folder, "gpt2", no_memory(*numbers))
    lacking = [size for size, there in steps.items() if not there]
    assert lacking == [missing] if missing else len(lacking) == len(steps)


def facts_beside_cpu(
    two: LocalRanks, folder: Path, family: str, trouble: Callable[[Shelf], None]
) -> list[Any]:
    """What `Shelf.facts` tells of both ranks, which is the same, once they have answered as a CPU
    does in spite of the trouble."""
    own = prompts(4, 6)
    with cpu_model(folder, family) as cpu:
        expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=9)]
    with open_model(two, folder, family, trouble) as model:
        assert [c.token_ids for c in model.generate(own, max_new_tokens=9)] == expected
        first, second = two.call("facts")
        assert first == second
    return list(first)


def no_inputs(shelf: Shelf) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    shelf.patch.setattr(prefill_graphs, "PrefillInputs", refuse)


def test_memory_is_short_on_one_before_a_capture(two: LocalRanks, folder: Path) -> None:
    """For what a prefill's graph would read: no rank captures it."""
    facts_beside_cpu(two, folder, "gpt2", no_inputs)


def not_covered(shelf: Shelf) -> None:
    SomeCaptures((), NotCoveredError)(shelf)


def no_prefill(shelf: Shelf) -> None:
    shelf.patch.setattr(executor.Prefill, "covers", lambda *_: False)


@pytest.mark.parametrize("trouble", [not_covered, no_prefill])
def test_kernels_do_not_cover_one(
    two: LocalRanks, folder: Path, trouble: Callable[[Shelf], None]
) -> None:
    _, prefills, steps = facts_beside_cpu(two, folder, "t5", trouble)
    assert not prefills
    assert bool(steps) == (trouble is no_prefill)


def no_many_keys(shelf: Shelf) -> None:
    covers = executor.Prefill.covers

    def refused(self: executor.Prefill, tiling: Tiling = SHORT) -> bool:
        return tiling != LONG and covers(self, tiling)

    shelf.patch.setattr(executor.Prefill, "covers", refused)


@pytest.mark.parametrize("trouble", [None, no_many_keys])
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_all_have_the_kernel_for_many_keys_or_none(
    two: LocalRanks, folder: Path, family: str, trouble: Callable[[Shelf], None] | None
) -> None:
    """They would capture different graphs, and wait for each other."""
    assert_same_as_cpu(folder, family, open_model(two, folder, family, trouble))
    (long, captured), other = two.call("prefills")
    assert other == (long, captured)
    assert long == (trouble is None)
    assert {tiling for *_, tiling in captured} == ({SHORT, LONG} if long else {SHORT})


def other_draws(shelf: Shelf) -> None:
    """Every draw by chance comes out differently, in graphs and beside them."""
    sample, draw_by_row = draws.sample, executor.draw_by_row

    def sampled(logits: Tensor, sampling: Any) -> Any:
        found = sample(logits, sampling)
        return found._replace(tokens=(found.tokens + 1) % logits.shape[-1])

    def drawn(logits: Tensor, rows: list[Row]) -> Any:
        found = draw_by_row(logits, rows)
        return {
            i: draw._replace(token=(draw.token + 1) % logits.shape[-1])
            for i, draw in found.items()
            if isinstance(draw, Draw)
        }

    shelf.patch.setattr(draws, "sample", sampled)
    shelf.patch.setattr(executor, "draw_by_row", drawn)


def test_one_would_draw_other_tokens(two: LocalRanks, folder: Path) -> None:
    """All go on with those of rank 0, which the caller gets."""
    own = prompts(20, 7)
    chosen: dict[str, Any] = {"max_new_tokens": 9, "do_sample": True, "seed": 3, "top_p": 0.9}
    with cpu_model(folder, "llama-mqa-biased-tied") as cpu:
        expected = [c.token_ids for c in cpu.generate(own, chosen)]
    with open_model(two, folder, "llama-mqa-biased-tied", other_draws) as model:
        assert [c.token_ids for c in model.generate(own, chosen)] == expected
        first, second = two.call("facts")
        assert first == second and first[0] > 20


# --- ranks that die or hang in a captured step


def die(shelf: Shelf) -> None:
    in_a_later_step(shelf, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang(shelf: Shelf) -> None:
    in_a_later_step(shelf, lambda: time.sleep(600))


def in_a_later_step(shelf: Shelf, fault: Callable[[], None]) -> None:
    """Behind the first sum of the fifth replay: the other rank waits for the second."""

    def before(number: int) -> None:
        if number < 5:
            return
        real, sums = Capturable.all_reduce, [0]

        def all_reduce(own: Capturable, x: Tensor) -> Tensor:
            sums[0] += 1
            if sums[0] == 2:
                (Path.cwd() / os.environ["MARK"]).write_text(str(time.time()))
                fault()
            return real(own, x)

        shelf.patch.setattr(Capturable, "all_reduce", all_reduce)

    shelf.count_replays(before)


def test_a_rank_dies_in_a_captured_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    """Told within 2 s, with the reason, by one run of three: a machine may be busy for as long."""
    told = (_failed(monkeypatch, tmp_path / "mark", folder, die) for _ in range(3))
    assert any(took < 2 and said == "rank 1 died: killed by SIGKILL" for took, said in told)


def test_a_rank_hangs_in_a_captured_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    monkeypatch.setenv(VARIABLE, "14")  # less, and a beat that is late on a busy machine counts
    took, said = _failed(monkeypatch, tmp_path / "mark", folder, hang)
    assert 14 <= took < 30
    assert said == "rank 1 hangs: no progress for 14 s"


def _failed(
    monkeypatch: pytest.MonkeyPatch, mark: Path, folder: Path, trouble: Callable[[Shelf], None]
) -> tuple[float, str]:
    """How long it took until the caller knew of the trouble, and what it was told."""
    monkeypatch.setenv("MARK", str(mark))
    ranks = LocalRanks(2, Shelf)
    model = open_model(ranks, folder, "gpt2", trouble)
    with pytest.raises(RankError, match=r"rank 1 (died|hangs): ") as caught:
        model.generate(prompts(3, 2), max_new_tokens=20, ignore_eos=True)
    took = time.time() - float(mark.read_text())
    deadline = time.monotonic() + 30
    while any(rank.process.is_alive() for rank in ranks.ranks):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return took, str(caught.value)


def test_the_host_waits_for_other_ranks_while_it_waits_for_a_step() -> None:
    """On a GPU that is the only place: what a graph holds, no host calls."""
    readings = [progress.read()]
    done: Any = SimpleNamespace(synchronize=lambda: readings.append(progress.read()))
    flight = Flight([], [], GREEDY, torch.tensor([4, -1]), done)
    assert flight.results() == [Draw(4, True), Draw(0, False)]
    readings.append(progress.read())
    assert [reading.waiting for reading in readings] == [False, True, False]
    assert readings[1].counted > readings[0].counted


def test_the_host_waits_for_other_ranks_while_it_fetches_what_a_call_returns() -> None:
    readings: list[progress.Reading] = []
    there: Any = SimpleNamespace(cpu=lambda: readings.append(progress.read()))
    torch_executor._fetched(there)
    assert readings[0].waiting and not progress.read().waiting
