"""From a step's logits to what goes back to the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmi_multi import progress
from lmi_multi.engine.batch import Continuation, Continuations, Draw, Row
from lmi_multi.ops.beams import Beams, best_continuations
from lmi_multi.ops.sampling import Sampled, SampleRow, Sampling, processed, sample
from lmi_multi.options import TokenLogprob


def draw(logits: Tensor, rows: Sequence[Row]) -> list[Draw | Continuations]:
    """What `rows`, all of which draw, get from `logits` float32[rows, vocab]."""
    return list(draw_by_row(logits, rows).values())


@progress.waiting()  # a device's results: they come when other ranks' have come to it
def draw_by_row(logits: Tensor, rows: Sequence[Row]) -> dict[int, Draw | Continuations]:
    """`draw` by the rows' numbers, rising: a search's beams get one answer, at their first row."""
    samples = [row.sample for row in rows if row.sample is not None]
    groups = list(_groups(rows))
    if not groups:
        return dict(enumerate(_tokens(logits, samples)))
    in_groups = [i for first, beams in groups for i in range(first, first + len(beams.scores))]
    alone = sorted(set(range(len(rows))) - set(in_groups))
    found: dict[int, Draw | Continuations] = {}
    if alone:
        own = [samples[i] for i in alone]
        found |= zip(alone, _tokens(logits[_index(alone, logits)], own), strict=True)
    own = [samples[i] for i in in_groups]
    beams = [group for _, group in groups]
    continued = _continuations(logits[_index(in_groups, logits)], own, beams)
    found |= zip([first for first, _ in groups], continued, strict=True)
    return {i: found[i] for i in sorted(found)}


def _groups(rows: Sequence[Row]) -> Iterator[tuple[int, Beams]]:
    """Every search in the step, and the number of its first row."""
    for i, row in enumerate(rows):
        if row.beams is not None:
            yield i, row.beams


def _index(rows: Sequence[int], logits: Tensor) -> Tensor:
    return torch.tensor(rows, device=logits.device)


def _tokens(logits: Tensor, rows: Sequence[SampleRow]) -> Iterator[Draw]:
    drawn = sample(logits, Sampling.of(rows, logits.device))
    tokens = zip(drawn.tokens.tolist(), drawn.finite.tolist(), _logprobs(rows, drawn), strict=True)
    for token, finite, logprob in tokens:
        yield Draw(token, finite, logprob)


def _logprobs(rows: Sequence[SampleRow], drawn: Sampled) -> list[TokenLogprob | None]:
    """Each row's, None where it did not ask."""
    if drawn.logprobs is None:
        return [None] * len(rows)
    found = zip(*(tensor.tolist() for tensor in drawn.logprobs), strict=True)
    results: list[TokenLogprob | None] = []
    for row, token in zip(rows, drawn.tokens.tolist(), strict=True):
        if row.logprobs is None:
            results.append(None)
            continue
        own, likeliest, values = next(found)
        best = dict(zip(likeliest[: row.logprobs], values, strict=False))
        results.append(TokenLogprob(token, own, best))
    return results


def _continuations(
    logits: Tensor, rows: Sequence[SampleRow], groups: Sequence[Beams]
) -> Iterator[Continuations]:
    """`logits` and `rows` are those of all the groups' beams, one group after the other."""
    finite = torch.isfinite(logits.amax(-1)).tolist()
    own = logits.log_softmax(-1)
    changed = processed(own, Sampling.of(rows, logits.device))
    scores, places = (part.tolist() for part in best_continuations(changed, groups))
    first, vocab = 0, logits.shape[-1]
    for group, best, where in zip(groups, scores, places, strict=True):
        entries = ranked(best[: group.keep], where, vocab)
        stop = first + len(group.scores)
        if rows[first].logprobs is not None:
            entries = _with_logprobs(entries, own[first:stop], rows[first].logprobs or 0)
        yield Continuations(entries, all(finite[first:stop]))
        first = stop


def ranked(scores: Sequence[float], places: Sequence[float], vocab: int) -> list[Continuation]:
    """Continuations with falling `scores` at `places`, beam * vocab + token; those of score -inf
    are none."""
    return [
        Continuation(*divmod(int(place), vocab), score)
        for score, place in zip(scores, places, strict=False)
        if score > float("-inf")
    ]


def _with_logprobs(entries: list[Continuation], own: Tensor, count: int) -> list[Continuation]:
    """The same with log-probabilities from `own` float32[beams, vocab]."""
    at = [[e.beam for e in entries], [e.token for e in entries]]
    chosen = own[torch.tensor(at, device=own.device).unbind()].tolist()
    values, ids = (part.tolist() for part in own.topk(min(count, own.shape[-1]), dim=-1))
    top = [dict(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return [
        Continuation(e.beam, e.token, e.score, TokenLogprob(e.token, logprob, top[e.beam]))
        for e, logprob in zip(entries, chosen, strict=True)
    ]
