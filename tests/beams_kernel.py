"""The kernels of beam search in plain torch: what csrc/beams.cu leaves, and csrc/copy_blocks.cu."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

MOST = 32  # beams of a search, and continuations


def beams(
    logits: Tensor, width: int, keep: int, own: Tensor, stops: Tensor, live: Tensor, found: Tensor,
    scores: Tensor, ids: Tensor, lengths: Tensor, turns: Tensor, table: Tensor, copies: Tensor,
    block_size: int, work: Tensor, counters: Tensor,
) -> bool:  # fmt: skip
    """The kernel, a search at a time, of equal scores the lowest place first; it refuses what it
    does not cover."""
    if logits.stride(1) != 1 or max(width, keep) > MOST:
        return False
    for number, first in enumerate(range(0, len(logits), width)):
        rows = slice(first, first + width)
        given = logits[rows].float().log_softmax(-1)
        total = (torch.where(given.isnan(), -torch.inf, given) + scores[rows, None]).flatten()
        best, places = (part[:keep] for part in total.sort(descending=True, stable=True))
        entries = [(-torch.inf, 0)] * keep
        entries[: len(best)] = zip(best.tolist(), places.tolist(), strict=True)
        vocab = logits.shape[1]
        record: list[Tensor] = [
            torch.tensor([score for score, _ in entries]).view(torch.int32),
            torch.tensor([place // vocab for _, place in entries]),
            torch.tensor([place % vocab for _, place in entries]),
            torch.isfinite(logits[rows].float().amax(-1)).all()[None],
        ]
        going = [
            (place // vocab, place % vocab, score)
            for score, place in entries
            if score > -torch.inf and place % vocab not in stops[first].tolist()
        ][:width]
        going += [(beam, 0, -torch.inf) for beam in range(len(going), width)]
        half, size = int(turns[first]), 3 * keep + 1 + 5 * width
        if live[first]:
            record += go_on(
                going, own[rows], scores[rows], ids[rows], lengths[rows], table[rows],
                copies[rows], block_size,
            )  # fmt: skip
            turns[rows] = 1 - turns[rows]
        else:
            copies[rows] = -1
        left = torch.cat([part.to(torch.int32) for part in record])
        found[half, number * size : number * size + len(left)] = left
    return True


def go_on(
    going: list[tuple[int, int, float]], own: Tensor, scores: Tensor, ids: Tensor, lengths: Tensor,
    table: Tensor, copies: Tensor, block_size: int,
) -> list[Tensor]:  # fmt: skip
    """One search's rows as the next step wants them; the end of its record."""
    parents, tokens, sums = (list(part) for part in zip(*going, strict=True))
    length = int(lengths[0])
    place, used = length // block_size, -(-length // block_size)
    table[:, :used] = table[parents, :used]
    blocks, sources = [-1] * len(going), [-1] * len(going)
    if place < table.shape[1]:
        blocks = own[:, place].tolist()
        if length % block_size:
            blocks = table[:, place].tolist()
            sharers = Counter(blocks)
            unused = iter(block for block in own[:, place].tolist() if block not in sharers)
            for row, block in enumerate(blocks):
                if sharers[block] > 1:
                    sharers[block] -= 1
                    blocks[row], sources[row] = next(unused), block
        table[:, place] = torch.tensor(blocks)
    copies.copy_(torch.tensor([sources, blocks]).t())
    ids.copy_(torch.tensor(tokens))
    scores.copy_(torch.tensor(sums))
    lengths.add_(1)
    bits = torch.tensor(sums).view(torch.int32)
    return [*map(torch.tensor, (parents, tokens)), bits, *map(torch.tensor, (blocks, sources))]


def copy_blocks(cache: Tensor, pairs: Tensor) -> bool:
    """The kernel."""
    for source, target in pairs.tolist():
        if source >= 0 and target >= 0:
            cache[:, :, target] = cache[:, :, source]
    return True
