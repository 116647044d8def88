"""How a captured step continues beam searches: what it is given of them, and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmi_multi.backends.drawing import ranked
from lmi_multi.engine.batch import Continuation, Continuations, Row

from .inputs import StepInputs, pinned, upload
from .ops import Scratch

# What the kernel covers (csrc/beams.h): beams of a search, continuations of one, tokens that stop.
MOST_BEAMS, MOST_KEPT, MOST_STOPS = 32, 32, 8
Records = npt.NDArray[np.int32]


class BeamKind(NamedTuple):
    """What a captured step must be able to do: searches of `width` rows each, of which `keep`
    continuations are wanted."""

    width: int
    keep: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> BeamKind | None:
        """What these rows need; None if a graph is not for them: they are not all of searches of
        one kind, or want scores changed before they are ranked, or more than scores."""
        first = rows[0].beams
        if first is None or len(first.scores) == 1:  # searches begin so, once
            return None
        kind = cls(len(first.scores), first.keep)
        asked = [row.beams for row in rows]
        alike = all(
            own is not None and (len(own.scores), own.keep) == kind for own in asked[:: kind.width]
        )
        searches = sum(own is not None for own in asked)
        plain = all(row.sample is not None and row.sample.is_plain for row in rows)
        return kind if alike and plain and searches * kind.width == len(rows) else None

    @property
    def record(self) -> int:
        """How many numbers the kernel leaves for a search: see csrc/beams.h."""
        return 3 * self.keep + 1 + 5 * self.width

    def results(self, found: Tensor, vocab: int) -> list[Continuations]:
        """What `BeamInputs.best` found, on the host."""
        kept = found.shape[1] // 2
        return [
            Continuations(ranked(own[:kept], own[kept:-1], vocab), finite=own[-1] > 0)
            for own in found.tolist()
        ]

    def continuations(self, records: Records) -> list[Continuations]:
        """What the kernel found, of each search; those of score -inf are none."""
        keep = self.keep
        scores = records[:, :keep].view(np.float32).tolist()
        beams = records[:, keep : 2 * keep].tolist()
        tokens = records[:, 2 * keep : 3 * keep].tolist()
        usable = records[:, 3 * keep].tolist()
        nothing = float("-inf")
        found = []
        for own, *best, finite in zip(scores, beams, tokens, usable, strict=True):
            continuations = list(map(Continuation, *best, own))
            if not own[-1] > nothing:  # scores fall
                continuations = [c for c in continuations if c.score > nothing]
            found.append(Continuations(continuations, finite > 0))
        return found

    def gone(self, records: Records) -> list[Gone]:
        """How the kernel let each search go on."""
        parts = records[:, 3 * self.keep + 1 :].reshape(len(records), 5, self.width)
        scores = parts[:, 2].view(np.float32).tolist()
        return [
            Gone(parents, tokens, tuple(own), blocks, sources)
            for (parents, tokens, _, blocks, sources), own in zip(
                parts.tolist(), scores, strict=True
            )
        ]


class Gone(NamedTuple):
    """How a search has gone on, by the rows of the next step: the row that each continues, its
    token, its score, the block that it writes to, and what was copied there before, -1: nothing."""

    parents: list[int]
    tokens: list[int]
    scores: tuple[float, ...]
    blocks: list[int]
    sources: list[int]

    def led_to(self, rows: Sequence[Row], before: Sequence[Row], block_size: int) -> bool:
        """Whether `rows` are what the search that was asked for by `before` has become."""
        now, was = rows[0].beams, before[0].beams
        if now is None or was is None or was.going is None or now.search != was.search:
            return False
        if now.scores != self.scores or now.keep != was.keep or len(rows) != len(before):
            return False
        start = before[0].length
        place, alike = start // block_size, (start, was.going.sample, before[0].cross_blocks)
        copies: list[tuple[int, int]] = []
        parts = zip(rows, self.parents, self.tokens, self.blocks, self.sources, strict=True)
        for row, parent, token, block, source in parts:
            # As tuples, which do not look into what is the same object on both sides.
            if (row.start, row.sample, row.cross_blocks) != alike:
                return False
            blocks, old = row.blocks, before[parent].blocks
            if row.token_ids[0] != token or blocks[place] != block:
                return False
            if blocks is not old and blocks[:place] != old[:place]:
                return False
            if source >= 0:
                copies.append((source, block))
        return list(rows[0].copies) == copies


class BeamInputs:
    """The searches of up to `inputs.most` rows on the device.

    For each row float32 `scores` of its beam so far; int32 `own` [rows, blocks], those that its
    search may give it, and `stops` [rows, MOST_STOPS], the tokens that end a beam, -1 filling up;
    and `copies` [rows, 2], which block is to be copied to which before the next step, -1: none.

    A step by the kernel leaves its records (`BeamKind.record`) in one half of `found`, int32 [2, n]
    in pinned memory, by the row's `turns`; see `StepInputs`.
    """

    def __init__(self, inputs: StepInputs) -> None:
        self._inputs = inputs
        (most, width), device = inputs.table.shape, inputs.ids.device
        sizes = [most, most * MOST_STOPS, most * width]
        self._host = np.zeros(sum(sizes), dtype=np.int32)
        self._packed = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        scores, stops, own = np.split(self._host, np.cumsum(sizes)[:-1])
        self._scores = scores.view(np.float32)
        self._stops, self._own = stops.reshape(most, -1), own.reshape(most, -1)
        parts = self._packed.split_with_sizes(sizes)
        self.scores = parts[0].view(torch.float32)
        self.stops, self.own = parts[1].view(most, -1), parts[2].view(most, -1)
        self.copies = torch.full((most, 2), -1, dtype=torch.int32, device=device)
        # A search has two rows at least.
        most_of_row = -(-BeamKind(2, MOST_KEPT).record // 2)
        self.found = pinned((2, most * most_of_row), torch.int32)
        self._records = self.found.numpy()

    def fill(self, rows: Sequence[Row], kind: BeamKind) -> None:
        """Put the rows' searches in the first places."""
        self._scores[len(rows) :] = 0
        self._stops[:] = -1
        self._own[:] = self._inputs.spare
        for i in range(0, len(rows), kind.width):
            beams = rows[i].beams
            if beams is None:
                continue
            self._scores[i : i + kind.width] = beams.scores
            if beams.going is not None and len(beams.going.stops) <= MOST_STOPS:
                self._stops[i, : len(beams.going.stops)] = beams.going.stops
                places = len(beams.going.own[0])
                self._own[i : i + kind.width, :places] = beams.going.own
        upload(self._host, self._packed)

    def step(self, logits: Tensor, kind: BeamKind, scratch: Scratch) -> Tensor | None:
        """Let the kernel find the best continuations of the searches in the first places, by the
        `logits` [rows, vocab] of the first rows, and prepare the inputs for the next step.

        Returns `found`; None, and nothing is done, where the kernel does not cover it.

        Scores are those of `lmi_multi.ops.beams.best_continuations` within 1e-5 times the larger of
        1 and their size: sums are float32's, exponentials approximate to 2**-21. Of equal ones the
        lowest place comes first.
        """
        inputs, rows = self._inputs, len(logits) // kind.width * kind.width
        if kind.width > MOST_BEAMS or kind.keep > MOST_KEPT or not rows:
            return None
        own = (inputs.ids, self.scores, inputs.lengths, inputs.turns, inputs.table, self.copies)
        ids, scores, lengths, turns, table, copies = (part[:rows] for part in own)
        done = torch.ops.lmi_multi.beams(
            logits[:rows],
            kind.width,
            kind.keep,
            self.own[:rows],
            self.stops[:rows],
            inputs.live[:rows],
            self.found,
            scores,
            ids,
            lengths,
            turns,
            table,
            copies,
            inputs.block_size,
            scratch.work,
            scratch.counters,
        )
        return self.found if done else None

    def records(self, kind: BeamKind, searches: int) -> Records:
        """Where the step that begins now leaves its records: [searches, record]."""
        half: Records = self._records[self._inputs.turn, : searches * kind.record]
        return half.reshape(searches, kind.record)

    def best(self, logits: Tensor, kind: BeamKind) -> Tensor:
        """The best continuations of the searches in the first places, as
        `lmi_multi.ops.beams.best_continuations` finds them, by torch.

        `logits` are float32 [rows, vocab]. Returns float64 [searches, 2 * kept + 1], which holds
        all of it exactly: scores, falling; places, beam * vocab + token; 1 if the logits of all
        beams were usable, else 0.
        """
        vocab = logits.shape[-1]
        searches = len(logits) // kind.width
        own = logits[: searches * kind.width]
        total = own.log_softmax(-1) + self.scores[: len(own), None]
        total = total.view(searches, kind.width * vocab)
        best = total.topk(min(kind.keep, total.shape[1]), dim=-1)
        finite = torch.isfinite(own.amax(-1)).view(searches, kind.width).all(-1, keepdim=True)
        return torch.cat([best.values.double(), best.indices.double(), finite.double()], -1)
