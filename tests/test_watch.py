"""Telling a rank that hangs from one that is slow, from what is heard of it."""

from __future__ import annotations

from typing import Any

import pytest

from lmi_multi import progress
from lmi_multi.engine.batch import Batch, Passage, Prompt, Row
from lmi_multi.errors import OptionError
from lmi_multi.parallel import executor
from lmi_multi.parallel.grid import Grid
from lmi_multi.parallel.ranks import Ranks
from lmi_multi.parallel.watch import VARIABLE, Patience, Watch, fault
from lmi_multi.progress import Reading
from tests.tiny_models import LIMITS


def _watch(silent: float, still: float, waiting: bool = False) -> Watch:
    watch = Watch()
    watch.heard(Reading(1, waiting))
    watch.passed(still - silent)
    watch.heard(Reading(1, waiting))
    watch.passed(silent)
    return watch


@pytest.mark.parametrize(
    ("watches", "expected"),
    [
        ([(1, 1), (1, 29)], None),
        ([(16, 16), (1, 1)], "rank 0 hangs: nothing was heard for 15 s"),
        ([(16, 31), (1, 31)], "rank 0 hangs: nothing was heard for 15 s"),
        ([(1, 31, True), (1, 31)], "rank 1 hangs: no progress for 30 s"),
        ([(1, 31, True), (1, 31, True)], "ranks 0, 1 hang: no progress for 30 s"),
        ([(1, 31, True), (1, 2)], None),  # it waits for one that gets on
        ([(1, 31, True), (1, 2, True)], None),
        ([(1, 31, True)], "rank 0 hangs: no progress for 30 s"),  # the others have answered
    ],
)
def test_who_hangs(watches: list[Any], expected: str | None) -> None:
    assert fault({i: _watch(*w) for i, w in enumerate(watches)}, Patience.of(1)) == expected


def test_a_rank_that_starts() -> None:
    """Its first word may be long in coming: it has libraries to load before."""
    new, begun = Watch(), _watch(0, 0)
    for watch in (new, begun):
        watch.passed(61)
    assert fault({0: new}, Patience.building()) is None
    assert fault({0: begun}, Patience.building()) == "rank 0 hangs: nothing was heard for 60 s"
    new.passed(240)
    assert fault({0: new}, Patience.building()) == "rank 0 hangs: nothing was heard for 300 s"
    new = Watch()
    new.passed(16)
    assert fault({0: new}, Patience.of(1)) == "rank 0 hangs: nothing was heard for 15 s"


def test_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Patience.of(1) == Patience.of(30) == Patience(15, 30, 15)
    assert Patience.of(102.4) == Patience(15, 102.4, 15)
    assert Patience.building() == Patience(60, 300, 300)
    monkeypatch.setenv(VARIABLE, "120")
    assert Patience.of(102.4) == Patience(60, 120, 60)
    for value in ("0", "-3", "soon", "1e9", "nan"):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(OptionError, match=rf"{VARIABLE} is '{value}'; allowed: seconds"):
            Patience.of(1)


def test_waiting_in_the_midst_of_waiting() -> None:
    """It goes on until the outer one ends."""
    with progress.waiting():
        before = progress.read().counted
        with progress.waiting():
            pass
        assert progress.read() == Reading(before + 1, True)
    assert not progress.read().waiting


@pytest.mark.parametrize(("group", "token"), [("gloo", 0.05), ("nccl", 0.005)])
def test_every_call_has_time_for_its_tokens(
    monkeypatch: pytest.MonkeyPatch, group: str, token: float
) -> None:
    given: list[tuple[str, float]] = []

    class Listed(Ranks):
        def call(self, method: str, *arguments: Any, still: float = 0.0) -> Any:
            given.append((method, still))

    monkeypatch.setattr(executor, "LocalRanks", lambda *_: Listed([], 0))
    opened = executor.open_ranks(Grid(2, 1), lambda *_: None, LIMITS, "device", group, "weights")  # type: ignore[arg-type,return-value]
    batch = Batch([Row([5] * 30, 0, [0], 30)], [Prompt([6] * 12)])
    opened.step(batch)
    opened.logits(batch)
    opened.encode([Prompt([6] * 12)])
    opened.score([Passage([5] * 30, [6] * 20)])
    opened.close()
    counts = [("step", 42), ("logits", 42), ("encode", 12), ("score", 50)]
    assert given == [(method, pytest.approx(count * token)) for method, count in counts]
