"""Decode steps begun before anybody has seen the tokens that they are fed.

The tokens that a captured step draws stay on the GPU as the next step's inputs, so the next step
can start at once, for all rows that will probably be in it; the host meanwhile reads the tokens,
looks for ends and plans. What it then plans for these rows has mostly been computed already. Rows
that have ended computed once too often: into their own blocks, before anything that their
successors write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmi_multi import progress
from lmi_multi.engine.batch import Draw, Row
from lmi_multi.ops.sampling import SampleRow

from .draws import GREEDY, DrawKind, can_capture
from .graphs import Captured, StepGraphs
from .inputs import download, recorded, upload


@dataclass
class Flight:
    """A step that was begun: of `rows`, each one token further than it says, drawing by `draws`.
    (Where `Ahead.start` has begun it, as they say.)

    `fed` are the tokens that it was given, once the host knows them.
    """

    rows: Sequence[Row]
    draws: Sequence[SampleRow]
    kind: DrawKind
    # Pinned int64 [rows]; there when `done` is, until the step after the next one begins.
    drawn: Tensor
    done: torch.cuda.Event
    fed: Sequence[int] = ()
    places: dict[int, int] = field(init=False)  # by a row's last block, which is its own

    def __post_init__(self) -> None:
        self.places = {row.blocks[-1]: place for place, row in enumerate(self.rows)}

    def place(self, row: Row) -> int | None:
        """Where in this flight `row` has been computed; None if it has not."""
        place = self.places.get(row.blocks[-1])
        if place is None or row.fresh or row.copies or row.beams is not None:
            return None
        before = self.rows[place]
        same = (
            row.start == before.length
            and row.sample == self.draws[place]
            and tuple(row.token_ids) == (self.fed[place],)
            and len(row.blocks) == len(before.blocks)
        )
        return place if same else None

    def results(self) -> list[Draw]:
        """What was drawn for every row; waits for it, and so for other ranks' part of it."""
        with progress.waiting():
            self.done.synchronize()
        return [Draw(max(token, 0), token >= 0) for token in self.drawn.tolist()]


class Ahead:
    """Begins steps, each before the last one's tokens are read, and after those before them are."""

    def __init__(self, graphs: StepGraphs) -> None:
        self._graphs = graphs
        self._begun: torch.cuda.Event | None = None  # the last step, when it is done

    def start(self, rows: Sequence[Row]) -> Flight | None:
        """Start the step that `rows` are of, none of which was begun before. None if not all of
        them are rows of one token for which a graph draws, or none of them goes on ahead."""
        draws = [row.sample for row in rows if row.sample and can_capture(row.sample)]
        single = all(len(row.token_ids) == 1 and row.beams is None for row in rows)
        if not single or len(draws) < len(rows):
            return None
        kind = self._graphs.draws.kind(draws)
        if kind != GREEDY and not any(row.ahead for row in rows):
            return None  # nothing is begun behind it: not worth one of few graphs
        graph = self._graph(len(rows), kind)
        if graph is None:
            return None
        self._graphs.inputs.fill(rows)
        self._graphs.draws.fill(draws)
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
        going = [i for i, row in enumerate(rows) if row.ahead and can_capture(row.ahead)]
        if not going:
            return None
        own = [rows[i] for i in going]
        draws = [row.ahead for row in own if row.ahead]
        kind = self._graphs.draws.kind(draws)
        graph = self._graph(len(own), kind)
        if graph is None:
            return None
        if last and last.kind == kind and self._continues(last, [places[i] for i in going], draws):
            if kind.any_sampled:
                self._graphs.draws.advance(draws)
        else:
            self._graphs.inputs.fill(own, ahead=1)
            self._graphs.draws.fill(draws)
            self._feed([tokens[i] for i in going], [places[i] for i in going])
        return self._replay(graph, own, draws, kind)

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
        if kind == GREEDY:
            drawn, done = found[self._graphs.inputs.turn, : len(rows)], recorded()
        else:
            drawn, done = download(found[: len(rows)])
        self._begun = done
        return Flight(rows, draws, kind, drawn, done)

    def wait(self) -> None:
        """Wait until no step is under way."""
        if self._begun is not None:
            self._begun.synchronize()

    def _continues(
        self, last: Flight, places: Sequence[int | None], draws: Sequence[SampleRow]
    ) -> bool:
        """Whether the rows are those of `last`, in its order, and want what they wanted."""
        return list(places) == list(range(len(last.rows))) and all(
            now.continues(before) for before, now in zip(last.draws, draws, strict=True)
        )

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
