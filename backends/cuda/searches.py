"""Beam searches in captured steps, each begun before the host has ranked what the last one found.

The kernel that finds the best continuations also lets the beams go on as the host most probably
will (`lmi_multi.ops.beams.Going`): their tokens, scores and blocks are the next step's inputs
already, and that step starts while the host still ranks. What the host then asks for is compared
with what the device has done. Searches that have ended were computed once too often: into their own
blocks, before anything that their successors write there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lmi_multi import progress
from lmi_multi.engine.batch import Continuations, Row

from .beams import MOST_STOPS, BeamKind, Gone, Records
from .capturing import Captured
from .graphs import StepGraphs
from .inputs import download, recorded


@dataclass
class Begun:
    """A step of searches. `rows` are what asked for it, by the searches' places; none while nobody
    has. Places without rows are of searches that have ended since the inputs were filled in."""

    rows: Mapping[int, Sequence[Row]]
    kind: BeamKind
    captured: Captured
    records: Records  # [searches, record] in pinned memory, there when `done` is
    done: torch.cuda.Event

    @cached_property
    def results(self) -> list[Continuations]:
        """What was found of each search."""
        return self.kind.continuations(self._read)

    @cached_property
    def gone(self) -> list[Gone]:
        """How each search went on."""
        return self.kind.gone(self._read)

    @cached_property
    def _read(self) -> Records:
        """A copy of the records, as the step after the next one writes to the same place; waits for
        them."""
        with progress.waiting():
            self.done.synchronize()
        records: Records = self.records.copy()
        return records


class Place(NamedTuple):
    """Where a search has been computed."""

    step: Begun
    number: int

    @property
    def width(self) -> int:
        """Its rows."""
        return self.step.kind.width

    @property
    def result(self) -> Continuations:
        """What was found."""
        return self.step.results[self.number]


class Searches:
    """Steps of beam searches over `graphs`. With `ahead` the next one is begun as soon as one is
    asked for; `cache` [layers, 2, blocks, ...] is where beams that part copy blocks.

    A step that failed on its way may be asked for once more, in the next batch that has searches:
    what the one begun after it has done to blocks would show if it were computed again, so its
    results are kept until that one is asked for.
    """

    def __init__(self, graphs: StepGraphs, cache: Tensor, ahead: bool) -> None:
        self._graphs, self._cache, self._ahead = graphs, cache, ahead
        self._last: Begun | None = None  # what was asked for
        self._next: Begun | None = None  # what was begun behind it
        self._fills = 0  # of the inputs, when the latest step began

    def taken(self, rows: Sequence[Row]) -> dict[int, Place]:
        """The searches among `rows` that have been begun already, by the numbers of their first
        rows."""
        firsts = _searched(rows) if self._last is not None else ()
        if not firsts:
            return {}
        found: dict[int, Place] = {}
        expected = 0  # most often they come in the order that they had
        for i in firsts:
            place = self._place(rows, i, expected)
            if place is not None:
                found[i], expected = place, place.number + 1
        if not found:  # these are others: what was begun means nothing any more
            self._last = self._next = None
        return found

    def go_on(self, rows: Sequence[Row], taken: Mapping[int, Place]) -> None:
        """Begin the step behind that which `rows` ask for, if it is what was begun last: all of
        their searches are `taken`, for others would have to join them. Those that have ended leave
        their places empty, while the others are too many for a smaller graph."""
        last, step, graphs = self._last, self._next, self._graphs
        if last is None or step is None or list(taken) != _searched(rows):
            return
        if any(place.step is not step for place in taken.values()):
            return
        width, count = step.kind.width, len(step.records)
        if graphs.size(len(taken) * width) != graphs.size(count * width):
            return
        step.rows = {place.number: rows[i : i + width] for i, place in taken.items()}
        for ended in last.rows.keys() - step.rows.keys():
            gone = slice(ended * width, (ended + 1) * width)
            graphs.inputs.drop(gone.start, gone.stop)
            graphs.beams.copies[gone] = -1  # the blocks may be another's since
        self._last, self._next = step, None
        self._next = self._behind(step)

    def run(self, rows: Sequence[Row], vocab: int, alone: bool) -> list[Continuations] | None:
        """Compute a step of searches alone, none of which was begun; None if no graph is for
        that. `alone`: no others were taken, which will join them in the next step."""
        kind, graphs = BeamKind.of(rows), self._graphs
        if kind is None:
            return None
        # The half that is not to be read any more. Now: what is run to capture a graph writes, too.
        graphs.inputs.turn = 1 - graphs.inputs.turn
        captured = graphs.searching(len(rows), kind)
        if captured is None:
            return None
        graphs.inputs.fill(rows)
        graphs.beams.fill(rows, kind)
        graphs.inputs.feed(rows)
        searches = len(rows) // kind.width
        if captured.out is not graphs.beams.found:
            found, done = download(captured.replay()[:searches])
            with progress.waiting():
                done.synchronize()
            return kind.results(found, vocab)
        self._last = self._next = None
        width = kind.width
        own = {number: rows[number * width : (number + 1) * width] for number in range(searches)}
        self._last = self._replay(own, captured, kind, searches)
        if alone:
            self._next = self._behind(self._last)
        return self._last.results

    def join(self) -> None:
        """Let the current stream wait for what is under way."""
        if step := self._next or self._last:
            step.done.wait()

    def wait(self) -> None:
        """Wait until nothing is under way."""
        if step := self._next or self._last:
            step.done.synchronize()

    def _place(self, rows: Sequence[Row], first: int, expected: int) -> Place | None:
        last, begun = self._last, self._next
        if last is None:
            return None
        width, size = last.kind.width, self._graphs.inputs.block_size
        own = rows[first : first + width]
        count = len(last.records)
        for number in itertools.chain(range(expected, count), range(min(expected, count))):
            before = last.rows.get(number)
            if before is None:
                continue
            if begun is not None and last.gone[number].led_to(own, before, size):
                return Place(begun, number)
            if own[0].start == before[0].start and list(own) == list(before):
                return Place(last, number)
        return None

    def _behind(self, step: Begun) -> Begun | None:
        """Begin the step behind `step`, which was begun last; None if not all of its searches are
        sure to have one, or its inputs are not there."""
        if not self._ahead or self._fills != self._graphs.inputs.fills:
            return None
        if not all(_goes_on(own[0]) for own in step.rows.values()):
            return None
        copies = self._graphs.beams.copies[: len(step.records) * step.kind.width]
        if not torch.ops.lmi_multi.copy_blocks(self._cache, copies):
            return None
        self._graphs.inputs.turn = 1 - self._graphs.inputs.turn
        return self._replay({}, step.captured, step.kind, len(step.records))

    def _replay(
        self,
        rows: Mapping[int, Sequence[Row]],
        captured: Captured,
        kind: BeamKind,
        searches: int,
    ) -> Begun:
        """Begin a step with the inputs as they are."""
        self._fills = self._graphs.inputs.fills
        captured.replay()
        records = self._graphs.beams.records(kind, searches)
        return Begun(rows, kind, captured, records, recorded())


def _searched(rows: Sequence[Row]) -> list[int]:
    """Where searches begin, but for those that have one row: their first step."""
    return [i for i, row in enumerate(rows) if row.beams and len(row.beams.scores) > 1]


def _goes_on(row: Row) -> bool:
    """Whether the search of which this is the first row goes on as `Going` says."""
    going = row.beams.going if row.beams else None
    return going is not None and len(going.stops) <= MOST_STOPS and going.sample.is_plain
