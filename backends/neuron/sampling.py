"""Draws inside a graph: the tokens that `lmi_multi.ops.sampling` draws from the same probabilities.

There is no sort: top-k, top-p and the draw itself are thresholds, found bit by bit, with a pass
over the vocabulary for each. And there are no 64-bit integers, which the hardware narrows to 32: a
weight of 38 bits is three limbs of 13, most significant first, along the first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmi_multi.ops.sampling import DRAW_BITS, SampleRow, Sampling

from . import ops

LIMB_BITS = 13
_LOW_BITS = DRAW_BITS - LIMB_BITS  # of a 24-bit number above its lowest limb
MOST_VOCAB = 2**31 // 2**LIMB_BITS  # so many limbs add up in 32 bits
COLUMNS = 3
STEP_BITS = 4  # that one pass finds, with a threshold for each of their values
_MANTISSA_BITS = 23
_EXPONENTS = range(-126, 128, 2**STEP_BITS)  # of normal float32; what is nearer to 0 counts as 0


def can_draw(row: SampleRow) -> bool:
    """Whether a graph carries the row's options: temperature, top-k and top-p."""
    return row.is_plain and (not row.temperature or (row.min_p == 0 and row.typical_p == 1))


def options(rows: Sequence[SampleRow], count: int) -> tuple[Tensor, Tensor]:
    """What `draw` wants of `count` rows, those beyond `rows` being padding: the temperatures
    float32 [count], 0 for greedy; and int64 [count, COLUMNS], top-k and, in units of 2**-24, top-p
    and the uniform number."""
    temperature, how = torch.zeros(count), torch.zeros(count, COLUMNS, dtype=torch.int64)
    sampling = Sampling.of(rows)
    if sampling.any_sampled:
        temperature[: len(rows)] = torch.where(sampling.greedy, 0.0, sampling.temperature)
        units = [(x * 2.0**DRAW_BITS).long() for x in (sampling.top_p, sampling.uniform)]
        how[: len(rows)] = torch.stack([sampling.top_k.clamp(max=MOST_VOCAB), *units], -1)
    return temperature, how


def draw(logits: Tensor, temperature: Tensor, how: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens int64 [rows] drawn from `logits` float32 [rows, vocab], and float32 [rows] that is
    not finite where a row's logits were unusable. The others as `options` makes them."""
    top_k, top_p, uniform = (part[:, None] for part in how.to(torch.int32).unbind(-1))
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    likeliest, best = ops.greedy(scaled)
    weights = _limbs(scaled.softmax(-1))
    # The two zeros are equal, and so is what lies between the least normal numbers.
    tiny = scaled.abs() < torch.full_like(scaled, 2.0 ** _EXPONENTS[0])
    scaled = torch.where(tiny, torch.zeros_like(scaled), scaled)
    ids = torch.arange(logits.shape[-1], device=logits.device).int()
    weights = torch.where(_top_k(scaled, top_k), weights, 0)
    weights = torch.where(_top_p(scaled, ids, weights, top_p), weights, 0)
    share = _share(_sum(weights, ids[None, None] >= 0), uniform)

    def at_most(start: Tensor) -> Tensor:
        """Whether the tokens before `start` weigh at most the share."""
        return ~_less(share, _sum(weights, ids < start[..., None]))

    drawn = _largest_id(at_most, logits)[:, 0]
    return torch.where(greedy, likeliest, drawn.long()), best


def _top_k(x: Tensor, k: Tensor) -> Tensor:
    """bool [rows, vocab]: the k [rows, 1] largest, and what ties with the last; 0 keeps all."""

    def enough(least: Tensor) -> Tensor:
        return (x[:, None] >= least[..., None]).sum(-1, dtype=torch.int32) >= k

    return (x >= _largest_float(enough, x)) | (k == 0)


def _top_p(x: Tensor, ids: Tensor, weights: Tensor, p: Tensor) -> Tensor:
    """bool [rows, vocab]: the fewest likeliest tokens that reach p [rows, 1] of the weight; of
    equal logits the highest ids come first."""
    reach = _at_least_one(_share(_sum(weights, ids[None, None] >= 0), p))

    def reached(stays: Tensor) -> Tensor:
        return ~_less(_sum(weights, stays), reach)

    cut = _largest_float(lambda least: reached(x[:, None] >= least[..., None]), x)
    above, ties = x > cut, x == cut
    first = _largest_id(
        lambda least: reached(above[:, None] | (ties[:, None] & (ids >= least[..., None]))), x
    )
    return above | (ties & (ids >= first)) | (p >= 1 << DRAW_BITS)


Number = tuple[Tensor, Tensor, Tensor]
"""Up to 39 bits: limbs int32 [rows, n], the most significant first, others of 13 bits."""

Holds = Callable[[Tensor], Tensor]
"""Of numbers [rows, n], whether something holds for them, bool [rows, n]; if it does, it holds for
all smaller ones of the row too."""


def _largest(holds: Holds, candidates: Tensor, found: Tensor) -> Tensor:
    """[rows, 1]: the largest of `candidates` [rows, n] for which `holds`, or else `found`."""
    return torch.where(holds(candidates), candidates, found).amax(-1, keepdim=True)


def _largest_id(holds: Holds, x: Tensor) -> Tensor:
    """int32 [rows, 1]: the largest id of `x` [rows, vocab] for which `holds`; it does for 0."""
    found = torch.zeros_like(x[:, :1]).int()
    steps = torch.arange(1, 2**STEP_BITS, device=x.device).int()
    bits = (x.shape[-1] - 1).bit_length()
    for bit in reversed(range(0, bits, STEP_BITS)):
        found = _largest(holds, found + (steps << bit), found)
    return found


def _largest_float(holds: Holds, x: Tensor) -> Tensor:
    """[rows, 1]: the largest element of `x` [rows, vocab] for which `holds`; -inf if there is none.

    The bits of its absolute value are found from the top. Every step is exact. Below zero it is
    the other way round: the largest value is looked for down to which nothing holds.
    """
    found = torch.zeros_like(x[:, :1])
    positive = holds(found)

    def below(bound: Tensor) -> Tensor:
        return holds(torch.where(positive, bound, -bound)) == positive

    steps = torch.arange(1, 2**STEP_BITS, device=x.device).float()
    exponents = torch.tensor([2.0**e for e in _EXPONENTS], device=x.device)
    powers = torch.tensor([2.0**e for e in range(1, 2**STEP_BITS)], device=x.device)
    found = _largest(below, exponents + found, found)
    found = _largest(below, powers * found, found)
    unit = found
    for _ in range(0, _MANTISSA_BITS, STEP_BITS):
        unit = unit * torch.full_like(unit, 2.0**-STEP_BITS)
        found = _largest(below, found + steps * unit, found)
    lowest = torch.full_like(x, float("-inf"))
    under = torch.where(x < -found, x, lowest).amax(-1, keepdim=True)
    return torch.where(positive, found, under)


def _limbs(probabilities: Tensor) -> Tensor:
    """int32 [3, ...]: floor(p * 2**38). Every step is exact: powers of two, and what is left."""
    parts, rest = [], probabilities * 2.0 ** (LIMB_BITS - 1)
    for _ in range(3):
        parts.append(rest.floor())
        rest = (rest - parts[-1]) * 2.0**LIMB_BITS
    return torch.stack(parts).to(torch.int32)


def _sum(weights: Tensor, where: Tensor) -> Number:
    """Of `weights` [3, rows, vocab] over those ids for which `where` [rows, n, vocab]."""
    limbs = torch.where(where, weights[:, :, None], 0).sum(-1, dtype=torch.int32)
    high, middle, low = limbs.unbind()
    carry, low = _split(low, LIMB_BITS)
    more, middle = _split(middle + carry, LIMB_BITS)
    return high + more, middle, low


def _split(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x >> bits, and the bits below."""
    high = x >> bits
    return high, x - (high << bits)


def _less(x: Number, y: Number) -> Tensor:
    """x < y, bool [rows, n]."""
    (x2, x1, x0), (y2, y1, y0) = x, y
    return (x2 < y2) | ((x2 == y2) & ((x1 < y1) | ((x1 == y1) & (x0 < y0))))


def _at_least_one(x: Number) -> Number:
    high, middle, low = x
    return high, middle, low + ((high | middle | low) == 0).int()


def _share(whole: Number, part: Tensor) -> Number:
    """whole * part >> 24, for int32 `part` [rows, 1] up to 2**24."""
    (high, middle, low), (p1, p0) = whole, _split(part, LIMB_BITS)
    carry, _ = _split(low * p0, LIMB_BITS)
    carry, r1 = _split(middle * p0 + low * p1 + carry, LIMB_BITS)
    carry, r2 = _split(high * p0 + middle * p1 + carry, LIMB_BITS)
    # 13 of 24 bits are gone with the lowest limb; the other 11 move down a limb each.
    carry, r3 = _split(high * p1 + carry, _LOW_BITS)
    above, r2 = _split(r2, _LOW_BITS)
    up = LIMB_BITS - _LOW_BITS
    return carry, above + (r3 << up), (r1 >> _LOW_BITS) + (r2 << up)
