"""Beam search on the device: the best continuations of each prompt's running beams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmi_multi.ops.sampling import SampleRow


class Going(NamedTuple):
    """How beams go on, where nothing but scores decides: as many of the best continuations as there
    are beams, without those whose token is one of `stops`, become the beams, the best first.

    `own` are blocks for each row and place among its blocks. A beam inherits the blocks of the one
    that it continues. For a place that this one does not have yet a beam takes its row's own block.
    Where several beams would write to the same block, the last of them does; each of the others
    gets a copy in the first row's own block for this place that no beam has.

    `sample` is how the rows will draw in the next step.
    """

    stops: tuple[int, ...]
    own: tuple[tuple[int, ...], ...]
    sample: SampleRow


class Beams(NamedTuple):
    """The running beams of one search, which are as many consecutive rows: `scores` are their
    log-probabilities so far. `keep` >= 1 of their best continuations are wanted.

    `going` is a hint for an executor that begins the next step before anybody has ranked these.
    None: that depends on more, or there is no such step. `search` is a number that no other search
    has, nor the same one begun anew.
    """

    scores: tuple[float, ...]
    keep: int
    going: Going | None = None
    search: int = 0


def best_continuations(log_probs: Tensor, groups: Sequence[Beams]) -> tuple[Tensor, Tensor]:
    """For each of `groups` the continuations with the largest sum of scores, falling.

    `log_probs` float32[rows, vocab] are those of all groups' beams, one group after the other.
    Returns scores float32[groups, most] and places int64[groups, most], where a place is
    beam * vocab + token; `most` is the largest `keep`, or all there are. Groups of fewer beams
    than others are filled up with places of score -inf.
    """
    vocab, device = log_probs.shape[-1], log_probs.device
    widths = [len(group.scores) for group in groups]
    widest = max(widths)
    scores = torch.tensor([s for group in groups for s in group.scores], device=device)
    total = log_probs + scores[:, None]
    if min(widths) < widest:
        filled = total.new_full((len(groups), widest, vocab), float("-inf"))
        group_of = torch.tensor([g for g, n in enumerate(widths) for _ in range(n)], device=device)
        beam_of = torch.tensor([b for n in widths for b in range(n)], device=device)
        filled[group_of, beam_of] = total
        total = filled
    total = total.view(len(groups), widest * vocab)
    best = total.topk(min(max(group.keep for group in groups), widest * vocab), dim=-1)
    return best.values, best.indices
