"""Log-probabilities of drawn tokens, and of the likeliest ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Logprobs(NamedTuple):
    """For the rows that asked, in order: `chosen` float32[rows] of the drawn tokens, `ids`
    int64[rows, most] and `top` float32[rows, most] of the likeliest, falling. `most` is the
    largest number that a row asked for, or the vocabulary."""

    chosen: Tensor
    ids: Tensor
    top: Tensor


@dataclass(frozen=True)
class Wanted:
    """Which `rows` int64[n] want log-probabilities, and of how many likeliest tokens at `most`."""

    rows: Tensor
    most: int

    @classmethod
    def of(cls, counts: Sequence[int | None], device: torch.device | str = "cpu") -> Wanted | None:
        """How many each row wants, None for nothing at all. None if no row wants any."""
        rows = [row for row, count in enumerate(counts) if count is not None]
        if not rows:
            return None
        return cls(torch.tensor(rows, device=device), max(c for c in counts if c is not None))

    def look_up(self, logits: Tensor, tokens: Tensor) -> Logprobs:
        """From `logits` float32[rows, vocab] as the model gave them and `tokens` int64[rows]."""
        scores = logits[self.rows].log_softmax(-1)
        top, ids = scores.topk(min(self.most, scores.shape[-1]), dim=-1)
        chosen = scores.gather(-1, tokens[self.rows, None])[:, 0]
        return Logprobs(chosen, ids, top)
