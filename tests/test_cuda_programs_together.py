"""Ranks whose steps are programs that wait for each other's sums: all of them or none. Two
processes over Gloo, with graphs, kernels and peer memory stood in for; test_cuda_program_ranks.py
has the real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import near
from torch import Tensor

from lmi_multi.parallel.local import LocalRanks
from tests.test_cuda_graphs import assert_same_as_cpu, cpu_model, prompts
from tests.test_cuda_together import FAMILIES, Capturable, Shelf, SomeCaptures, open_model


class NearShelf(Shelf):
    """As `Shelf`, with peers that are near."""

    def peers(self) -> Capturable:
        self.patch.setattr(near, "host_flag", lambda: torch.zeros(1, dtype=torch.int32))
        peers = Capturable()
        addresses = torch.tensor([100 + rank for rank in range(self.size)])
        peers.near = near.PeerMemory(addresses, self.rank, 60.0)
        return peers

    def made(self) -> list[Any]:
        """Of every rank: which programs there are (True), or were not to be had (False), of the two
        sets of graphs; and whether any has run."""
        opened = self.executor
        assert opened is not None and opened._fed and opened._ahead
        own = [
            {size: program is not None for size, program in graphs._programs.items()}
            for graphs in (opened._fed, opened._ahead._graphs)
        ]
        return self.gathered((own, self.programs.runs > 0))


@pytest.fixture(scope="module")
def two() -> Iterator[LocalRanks]:
    opened = LocalRanks(2, NearShelf)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("family", [*FAMILIES, "gptneox"])
def test_tokens_are_those_of_one_process(two: LocalRanks, folder: Path, family: str) -> None:
    """Every kind of draw, and rows that come and go; prefills and steps of more rows than a program
    has are between."""
    assert_same_as_cpu(folder, family, open_model(two, folder, family))
    first, second = two.call("made")
    assert first == second
    (fed, ahead), ran = first
    assert ran and all(fed.values()) and all(ahead.values())
    assert set(fed) | set(ahead) == {1, 2, 4, 8}


def refused(shelf: Shelf) -> None:
    """The kernels do not cover a sum."""
    shelf.patch.setattr(torch.ops.lmi_multi, "record_sum", lambda *_: False)


def no_launch(shelf: Shelf) -> None:
    """The GPU does not start all blocks at once."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("launch: too many blocks in cooperative launch\nmore")

    shelf.patch.setattr(torch.ops.lmi_multi, "run_program", refuse)


def no_room(shelf: Shelf) -> None:
    """Memory is missing for the first program that is recorded."""
    real, calls = torch.ops.lmi_multi.record_sum, [0]

    def record(*given: Any) -> bool:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError("no room")
        done: bool = real(*given)
        return done

    shelf.patch.setattr(torch.ops.lmi_multi, "record_sum", record)


def no_graph(shelf: Shelf) -> None:
    """Memory is missing for the third graph."""
    SomeCaptures((3,), torch.OutOfMemoryError)(shelf)


@pytest.mark.parametrize(
    ("trouble", "programs"),
    [(refused, False), (no_launch, False), (no_room, True), (no_graph, True)],
)
def test_trouble_on_one(
    two: LocalRanks, folder: Path, trouble: Callable[[Shelf], None], programs: bool
) -> None:
    """What one cannot run, none does: it would wait for ever. All answer as a CPU does."""
    own = prompts(4, 6)
    with cpu_model(folder, "gptj") as cpu:
        expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=9)]
    with open_model(two, folder, "gptj", trouble) as model:
        assert [c.token_ids for c in model.generate(own, max_new_tokens=9)] == expected
        first, second = two.call("made")
        assert first[0] == second[0]
        assert set(first[0][1].values()) == {programs}


def test_a_program_sums_what_products_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not anything else; and what has been sent is nowhere to be read."""
    from lmi_multi.backends.cuda.program import NotCoveredError, Recorder

    from tests.cuda_stand_ins import stand_in

    stand_in(monkeypatch)
    x, weight = torch.zeros(1, 8), torch.zeros(8, 8)
    recorder = Recorder([x])
    with pytest.raises(NotCoveredError):
        recorder.sum(x, x, None)

    def product(given: Tensor) -> Tensor:
        out = torch.empty(1, 8)
        scratch = torch.empty(0)
        terms = (None, None, None, None, 0.0, None, 0, False, 0)
        assert recorder.linear(given, weight, *terms, scratch, scratch, out)
        return out

    sent = product(x)
    total = recorder.sum(x, sent, None)
    assert recorder.made(total) and not recorder.made(sent)
    with pytest.raises(NotCoveredError):
        product(sent)
