"""Beam search inside a graph: each beam's likeliest continuations, which the host merges.

No beam has more of a search's best continuations than are wanted, so those that are likeliest of
each beam hold them all, whatever searches share the step. They are found one after another, each
as the largest that is left: the hardware's compiler refuses a sort, whole or partial.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmi_multi.engine.batch import Continuation, Continuations, Row

from . import ops

KEPT = 16  # eight beams with one token that ends them, or four with three


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest log-probabilities float32 [rows, count] of `logits` [rows, vocab], the
    largest first, and their ids int64 [rows, count]; of equal ones the lowest id first."""
    left = logits.log_softmax(-1)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    never = torch.full_like(left, float("-inf"))
    found = []
    for _ in range(count):
        token, score = ops.greedy(left)
        found.append((score, token))
        left = torch.where(ids == token[:, None], never, left)
    scores, tokens = zip(*found, strict=True)
    return torch.stack(scores, -1), torch.stack(tokens, -1)


def can_rank(rows: Sequence[Row], kept: int) -> bool:
    """Whether `kept` continuations of each of a search's `rows` are enough: no score has to be
    changed before they are ranked, and no other log-probability is asked for."""
    beams = rows[0].beams
    samples = [row.sample for row in rows if row.sample is not None]
    return beams is not None and beams.keep <= kept and all(own.is_plain for own in samples)


def ranked(rows: Sequence[Row], best: Tensor, scores: Tensor, ids: Tensor) -> Continuations:
    """The best continuations of the beams in `rows`, from their largest logits `best` [rows] and
    what `likeliest` found: what `lmi_multi.ops.beams.best_continuations` finds among all."""
    beams = rows[0].beams
    if beams is None:
        raise TypeError("the first row of a search tells its scores")
    total = scores + torch.tensor(beams.scores)[:, None]
    entries = [
        Continuation(beam, token, score)
        for beam, own in enumerate(zip(ids.tolist(), total.tolist(), strict=True))
        for token, score in zip(*own, strict=True)
        if score > float("-inf")
    ]
    entries.sort(key=lambda entry: -entry.score)
    return Continuations(entries[: beams.keep], bool(torch.isfinite(best).all()))
