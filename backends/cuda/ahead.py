"""Decode steps begun before anybody has seen the tokens that they are fed.

The tokens that a captured step draws stay on the GPU as the next step's inputs, so the next step
can start at once, for all rows that will probably be in it; the host meanwhile reads the tokens,
looks for ends and plans. What it then plans for these rows has mostly been computed already. Rows
that have ended computed once too often: into their own blocks, before anything that their
successors write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmi_multi import progress
from lmi_multi.engine.batch import Draw, Row
from lmi_multi.ops.sampling import SampleRow, uniforms

from .capturing import Captured
from .draws import GREEDY, Chances, DrawKind, is_greedy
from .fused_draws import logprob
from .graphs import StepGraphs
from .inputs import download, recorded, upload

# Of how many steps random numbers are made in one go: it takes little longer than for one.
DRAWN_AT_ONCE = 8


@dataclass
class Flight:
    """A step that was begun: of `rows`, each one token further than it says, drawing by `draws`.
    (Where `Ahead.start` has begun it, as they say.)

    `numbers` are those that its rows had among all that might have been in it. `chances` are random
    numbers for the steps behind it, as far as they have been made: if these are of the same rows.
    `fed` are the tokens that it was given, once the host knows them.
    """

    rows: Sequence[Row]
    draws: Sequence[SampleRow]
    kind: DrawKind
    # Pinned int64 [rows]; there when `done` is, until the step after the next one begins.
    drawn: Tensor
    done: torch.cuda.Event
    numbers: Sequence[int] = ()
    chances: Sequence[Chances] = ()
    fed: Sequence[int] = ()
    records: Tensor | None = None  # of log-probabilities, as `drawn`: where rows want any

    def is_of(self, rows: Sequence[Row]) -> bool:
        """Whether `rows` are what has been computed, in this order."""
        return len(rows) == len(self.fed) and all(
            map(_follows, rows, self.rows, self.draws, self.fed)
        )

    def place(self, row: Row) -> int | None:
        """Where in this flight `row` has been computed; None if it has not."""
        place = self._places.get(row.blocks[-1])
        if place is None:
            return None
        same = _follows(row, self.rows[place], self.draws[place], self.fed[place])
        return place if same else None

    @cached_property
    def _places(self) -> dict[int, int]:
        """By a row's last block, which is its own."""
        return {row.blocks[-1]: place for place, row in enumerate(self.rows)}

    def results(self) -> list[Draw]:
        """What was drawn for every row; waits for it, and so for other ranks' part of it."""
        with progress.waiting():
            self.done.synchronize()
        tokens = self.drawn.tolist()
        if self.records is not None:
            return list(map(_with_logprob, tokens, self.draws, self.records.numpy()))
        if min(tokens) >= 0:  # most often
            return list(map(Draw, tokens))
        return [Draw(max(token, 0), token >= 0) for token in tokens]


class Ahead:
    """Begins steps, each before the last one's tokens are read, and after those before them are."""

    def __init__(self, graphs: StepGraphs) -> None:
        self._graphs = graphs
        self._begun: torch.cuda.Event | None = None  # the last step, when it is done

    @property
    def follows(self) -> bool:
        """See `Limits.follows`."""
        return self._graphs.draws.follows

    def going(self, rows: Sequence[Row]) -> list[int]:
        """The numbers of those that may be in a step that is begun behind the one they are of."""
        return self._graphs.draws.fitting([row.ahead for row in rows])

    def start(self, rows: Sequence[Row]) -> Flight | None:
        """Start the step that `rows` are of, none of which was begun before. None if not all of
        them are rows of one token for which a graph draws, or none of them goes on ahead."""
        own = self._graphs.draws
        draws = [row.sample for row in rows if row.sample is not None]
        single = all(len(row.token_ids) == 1 and row.beams is None for row in rows)
        if not single or len(own.fitting(draws)) < len(rows):
            return None
        kind = own.kind(draws)
        if kind != GREEDY and not self.going(rows):
            return None  # nothing is begun behind it: not worth one of few graphs
        graph = self._graph(len(rows), kind)
        if graph is None:
            return None
        self._graphs.inputs.fill(rows)
        own.fill(draws)
        own.remember(rows, draws)
        self._graphs.inputs.feed(rows)
        return self._replay(graph, rows, draws, kind)

    def begin(
        self, rows: Sequence[Row], tokens: Sequence[int | None], places: Sequence[int | None],
        last: Flight | None,
    ) -> Flight | None:  # fmt: skip
        """Start the step after the one that `rows` are of, with those that will be in it.

        Each row is fed its one of `tokens`, or, where that is None, what `last` has drawn or is
        about to draw at its one of `places`. None if no row is sure enough of what it wants.
        """
        draws = [row.ahead for row in rows if row.ahead]
        if last and len(draws) == len(rows) and _continues(last, places, draws):  # most often
            return self._go_on(rows, draws, last)
        going = self.going(rows)
        if not going:
            return None
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            draws = [row.ahead for row in rows if row.ahead]
            tokens, places = [tokens[i] for i in going], [places[i] for i in going]
        own = self._graphs.draws
        kind = own.kind(draws)
        graph = self._graph(len(rows), kind)
        if graph is None:
            return None
        self._graphs.inputs.fill(rows, ahead=1)
        own.fill(draws)
        new = [i for i, place in enumerate(places) if place is None]
        own.remember([rows[i] for i in new], [draws[i] for i in new], ahead=1)
        self._feed(tokens, places)
        begun = self._replay(graph, rows, draws, kind)
        begun.numbers = going
        return begun

    def _go_on(
        self, rows: Sequence[Row], draws: Sequence[SampleRow], last: Flight
    ) -> Flight | None:
        """The step behind `last`, with its rows: the device has all but random numbers."""
        graph = self._graph(len(rows), last.kind)
        if graph is None:
            return None
        chances: Sequence[Chances] = ()
        if last.kind.any_sampled:
            now, *chances = last.chances or uniforms(draws, DRAWN_AT_ONCE)
            self._graphs.draws.advance(now)
        begun = self._replay(graph, rows, draws, last.kind)
        begun.numbers, begun.chances = range(len(rows)), chances
        return begun

    def _graph(self, rows: int, kind: DrawKind) -> Captured | None:
        """A step that draws to the half of the tokens' memory that has been read: those of the last
        step have yet to be. Turned now: also what is run to capture a graph writes its tokens."""
        inputs = self._graphs.inputs
        inputs.turn = 1 - inputs.turn
        return self._graphs.drawing(rows, kind)

    def _replay(
        self, graph: Captured, rows: Sequence[Row], draws: Sequence[SampleRow], kind: DrawKind
    ) -> Flight:
        """Start the step with the inputs as they are."""
        found = graph.replay()
        if found is self._graphs.inputs.tokens:
            drawn, done = found[self._graphs.inputs.turn, : len(rows)], recorded()
        else:
            drawn, done = download(found[: len(rows)])
        self._begun = done
        records = self._graphs.draws.records(draws, self._graphs.inputs.turn)
        return Flight(rows, draws, kind, drawn, done, records=records)

    def wait(self) -> None:
        """Wait until no step is under way."""
        if self._begun is not None:
            self._begun.synchronize()

    def _feed(self, tokens: Sequence[int | None], places: Sequence[int | None]) -> None:
        """Put the next tokens in the first places: those given, else those drawn at `places`."""
        ids = self._graphs.inputs.ids
        host = np.array(
            [[-1 if t is None else t for t in tokens], [p or 0 for p in places]], dtype=np.int64
        )
        device = torch.empty(host.shape, dtype=torch.int64, device=ids.device)
        upload(host, device)
        given, from_places = device
        ids[: len(tokens)] = torch.where(given < 0, ids[from_places], given)


def _with_logprob(token: int, row: SampleRow, record: npt.NDArray[np.int32]) -> Draw:
    if token < 0 or row.logprobs is None:
        return Draw(max(token, 0), token >= 0)
    return Draw(token, True, logprob(token, row.logprobs, record))


def _follows(row: Row, before: Row, draw: SampleRow, token: int) -> bool:
    """Whether `row` is the one behind `before`: fed `token`, and drawing by `draw`."""
    return (
        row.start == before.start + len(before.token_ids)
        and row.sample is not None
        and row.sample.same(draw)
        and [*row.token_ids] == [token]
        and row.blocks == before.blocks
        and not (row.fresh or row.copies or row.beams)
    )


def _continues(last: Flight, places: Sequence[int | None], draws: Sequence[SampleRow]) -> bool:
    """Whether the rows are those of `last`, in its order, and want what they wanted."""
    if list(places) != list(range(len(last.rows))):
        return False
    if last.kind == GREEDY:  # which has no options
        return is_greedy(draws)
    return all(map(SampleRow.continues, draws, last.draws))
