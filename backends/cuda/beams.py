"""How a captured step continues beam searches: their scores, where a graph finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmi_multi.backends.drawing import ranked
from lmi_multi.engine.batch import Continuations, Row
from lmi_multi.ops.sampling import SampleRow

from .draws import can_capture
from .inputs import upload


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
        plain = all(row.sample is not None and _is_plain(row.sample) for row in rows)
        return kind if alike and plain and searches * kind.width == len(rows) else None

    def results(self, found: Tensor, vocab: int) -> list[Continuations]:
        """What `BeamInputs.best` found, on the host."""
        kept = found.shape[1] // 2
        return [
            Continuations(ranked(own[:kept], own[kept:-1], vocab), finite=own[-1] > 0)
            for own in found.tolist()
        ]


class BeamInputs:
    """The scores of up to `most` rows on the device."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._scores = torch.zeros(most, device=device)

    def fill(self, rows: Sequence[Row]) -> None:
        """Put the rows' scores in the first places."""
        scores = [score for row in rows if row.beams for score in row.beams.scores]
        upload(np.array(scores, dtype=np.float32), self._scores[: len(scores)])

    def best(self, logits: Tensor, kind: BeamKind) -> Tensor:
        """The best continuations of the searches in the first places, as
        `lmi_multi.ops.beams.best_continuations` finds them.

        `logits` are float32 [rows, vocab]. Returns float64 [searches, 2 * kept + 1], which holds
        all of it exactly: scores, falling; places, beam * vocab + token; 1 if the logits of all
        beams were usable, else 0.
        """
        vocab = logits.shape[-1]
        searches = len(logits) // kind.width
        own = logits[: searches * kind.width]
        total = own.log_softmax(-1) + self._scores[: len(own), None]
        total = total.view(searches, kind.width * vocab)
        best = total.topk(min(kind.keep, total.shape[1]), dim=-1)
        finite = torch.isfinite(own.amax(-1)).view(searches, kind.width).all(-1, keepdim=True)
        return torch.cat([best.values.double(), best.indices.double(), finite.double()], -1)


def _is_plain(row: SampleRow) -> bool:
    return not row.banned and can_capture(row)
