"""From logits to the next token: edits, bans, temperature, filters and a seeded draw.

This is the reference that kernels are compared with. Beyond the softmax all arithmetic is on
integers: a probability becomes a weight of 38 bits, so sums are exact in whatever order they are
added, and a kernel with the same probabilities draws the same tokens.

Nothing here waits for the device: which steps are needed is decided by Python flags in `Sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmi_multi.ops import philox
from lmi_multi.ops.logprobs import Logprobs, Wanted
from lmi_multi.ops.processors import Edit, Edits
from lmi_multi.ops.rules import History, Rules

# Weight bits, and bits of a draw: their sum must stay below 63, for products in int64.
WEIGHT_BITS = 38
DRAW_BITS = 24
# Below the first, any gap between two logits already decides, above the second none does; dividing
# by less would overflow, and what is more is no float32.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-30, 1e30
# With every top_k at most the last of these, a partial sort suffices. Few sizes: few traced graphs.
WINDOWS = (64, 256, 1024)


class SampleRow(NamedTuple):
    """How one row draws its next token. A tuple, as one is made for each row of each step.

    `temperature` 0 is greedy. `top_k` >= 0, 0 is off; `top_p` in (0, 1], 1 is off; `seed` in
    [0, 2**64); `step` counts the row's draws from 0. `banned` ids are not drawn in this step,
    whatever came before; those outside the vocabulary are skipped. `min_p` in [0, 1], 0 is off;
    `typical_p` in (0, 1], 1 is off. `rules` change the logits before all else, and ban more ids;
    None where there are none. Unless `forced` is empty one of its ids is drawn, and of all else
    only `banned` matters. `stream` in [0, 2**32) keeps apart the draws of rows that share a seed.
    `logprobs`: of how many likeliest tokens log-probabilities are wanted beside the drawn one's;
    None for nothing at all. `history`: the tokens that the rules read, if they read any.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    step: int = 0
    banned: tuple[int, ...] = ()
    min_p: float = 0.0
    typical_p: float = 1.0
    rules: Rules | None = None
    forced: tuple[int, ...] = ()
    stream: int = 0
    logprobs: int | None = None
    history: History | None = None  # last, so that comparisons can leave it out

    @property
    def edit(self) -> Edit | None:
        """What the logits undergo in this step. Raises ValueError as `Rules.edit` does."""
        if self.forced:
            return Edit(forced=self.forced)
        return None if self.rules is None else self.rules.edit(self.history, self.step)

    @property
    def bans(self) -> tuple[int, ...]:
        """All ids that are not drawn in this step: `banned`, then those of the rules, which a
        forced token overrides. Raises ValueError as `Rules.bans` does."""
        if self.rules is None or self.forced:
            return self.banned
        return tuple(dict.fromkeys(self.banned + self.rules.bans(self.history, self.step)))

    @property
    def is_plain(self) -> bool:
        """Whether in this step the model's scores are all that matters: nothing is edited or
        banned, and no log-probability asked for. Raises ValueError as `Rules.edit` does."""
        return self.logprobs is None and self.edit is None and not self.bans

    def at(self, step: int, stream: int, history: History | None = None) -> SampleRow:
        """The same for another step and stream, and with this history, if one is given: as
        `_replace`, in a third of its time."""
        (
            temperature, top_k, top_p, seed, _, banned, min_p, typical_p, rules, forced, _,
            logprobs, own,
        ) = self  # fmt: skip
        return SampleRow(
            temperature, top_k, top_p, seed, step, banned, min_p, typical_p, rules, forced, stream,
            logprobs, own if history is None else history,
        )  # fmt: skip

    def same(self, other: SampleRow) -> bool:
        """Whether it draws as `other` does, if their tokens are the same: equal but for history,
        of which one side may know less, and which is long to compare."""
        return self is other or self[:-1] == other[:-1]

    def continues(self, before: SampleRow) -> bool:
        """Whether it differs from `before` in nothing but its history and its step, which is the
        next one."""
        return (
            self.step == before.step + 1
            and self[:_STEP] == before[:_STEP]
            and self[_STEP + 1 : -1] == before[_STEP + 1 : -1]
        )


_STEP = SampleRow._fields.index("step")


class Sampled(NamedTuple):
    """`tokens` int64[rows], and `finite` bool[rows]: False where the logits were unusable.

    `logprobs` are None unless a row asked for them; those of unusable rows mean nothing.
    """

    tokens: Tensor
    finite: Tensor
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Sampling:
    """The rows of one step as tensors, and as Python flags what the step needs.

    `temperature` float32[rows] (1 for greedy rows), `greedy` bool[rows], `top_k` int64[rows],
    `top_p`, `min_p` and `typical_p` float32[rows] (multiples of 2**-24, rounded down), `uniform`
    float32[rows] in [0, 1); all of them are empty when `any_sampled` is False. `banned` is
    int64[rows, most], padded with -1, and empty when `any_banned` is False. `edits` and `wanted`
    are None when no row has an edit, or wants log-probabilities.

    `window`: how many of the largest logits the filters look at; 0: no row filters, -1: all.
    """

    temperature: Tensor
    greedy: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    uniform: Tensor
    banned: Tensor
    any_sampled: bool
    any_greedy: bool
    any_top_p: bool
    any_min_p: bool
    any_typical: bool
    any_banned: bool
    window: int
    edits: Edits | None
    wanted: Wanted | None

    @property
    def any_filtered(self) -> bool:
        """Whether a row uses top-k or top-p."""
        return self.window != 0

    @classmethod
    def of(cls, rows: Sequence[SampleRow], device: torch.device | str = "cpu") -> Sampling:
        """The rows on `device`, in order. Raises ValueError for one whose rules read tokens that
        its history lacks."""
        sampled = [row for row in rows if row.temperature > 0]
        drawn = rows if sampled else ()
        banned = [row.bans for row in rows]
        return cls(
            temperature=_column(
                [bounded_temperature(r.temperature) if r.temperature else 1.0 for r in drawn],
                torch.float32,
                device,
            ),
            greedy=_column([not row.temperature for row in drawn], torch.bool, device),
            top_k=_column([row.top_k for row in drawn], torch.int64, device),
            top_p=_column([floor_24(row.top_p) for row in drawn], torch.float32, device),
            min_p=_column([floor_24(row.min_p) for row in drawn], torch.float32, device),
            typical_p=_column([floor_24(row.typical_p) for row in drawn], torch.float32, device),
            uniform=uniform(drawn, device),
            banned=_banned(banned, device),
            any_sampled=bool(sampled),
            any_greedy=len(sampled) < len(rows),
            any_top_p=any(row.top_p < 1 for row in sampled),
            any_min_p=any(row.min_p > 0 for row in sampled),
            any_typical=any(row.typical_p < 1 for row in sampled),
            any_banned=any(banned),
            window=_window(sampled),
            edits=Edits.of([row.edit for row in rows], device),
            wanted=Wanted.of([row.logprobs for row in rows], device),
        )


def sample(logits: Tensor, sampling: Sampling) -> Sampled:
    """Draw one token a row from `logits` float32[rows, vocab]; they are left as they are.

    Order and meaning as in Hugging Face: edits, bans, temperature, top-k (what ties with the k-th
    stays), top-p, min-p, typical, softmax. The draw inverts the cumulative distribution in
    vocabulary order at the row's one uniform number. Greedy rows take the largest logit, the
    lowest id among equals. Log-probabilities are those of `logits` as they come.

    A row whose logits hold a NaN or +inf, or nothing but -inf once bans are applied, has
    `finite` False and token 0; other rows do not notice. -inf means "never".
    """
    given, finite = logits, None
    if sampling.any_banned or sampling.edits is not None:
        finite = torch.isfinite(logits.amax(-1))  # neither must hide an infinity
    logits = processed(logits, sampling)
    best, tokens = logits.max(-1)  # NaN counts as the largest: one pass finds both
    if sampling.any_sampled:
        best = best / sampling.temperature
        drawn = _draw(_weights(logits / sampling.temperature[:, None], sampling), sampling.uniform)
        tokens = torch.where(sampling.greedy, tokens, drawn) if sampling.any_greedy else drawn
    usable = torch.isfinite(best)  # what an unusable row drew above means nothing
    finite = usable if finite is None else usable & finite
    tokens = torch.where(finite, tokens, 0)
    wanted = sampling.wanted
    return Sampled(tokens, finite, None if wanted is None else wanted.look_up(given, tokens))


def processed(logits: Tensor, sampling: Sampling) -> Tensor:
    """`logits` float32[rows, vocab] after the rows' edits and bans."""
    if sampling.edits is not None:
        logits = sampling.edits.apply(logits)
    if sampling.any_banned:
        logits = _ban(logits, sampling.banned)
    return logits


def _ban(logits: Tensor, banned: Tensor) -> Tensor:
    """`logits` with -inf at the ids of `banned` [rows, most]; ids outside are padding."""
    real = (banned >= 0) & (banned < logits.shape[-1])
    # The smaller of the two wins, so padding, which points at id 0, changes nothing there.
    value = torch.where(real, float("-inf"), float("inf")).to(logits.dtype)
    return logits.scatter_reduce(-1, torch.where(real, banned, 0), value, "amin")


def _weights(logits: Tensor, sampling: Sampling) -> Tensor:
    """int64[rows, vocab]: what each token weighs in the draw; 0 where it must not be drawn."""
    weights = (logits.softmax(-1) * 2.0**WEIGHT_BITS).to(torch.int64)
    if sampling.any_filtered:
        weights = _likeliest(logits, weights, sampling)
    if sampling.any_min_p:
        least = _share(weights.amax(-1), sampling.min_p)
        weights = torch.where(weights < least[:, None], 0, weights)
    if sampling.any_typical:
        weights = _typical(logits, weights, sampling.typical_p)
    return weights


def _likeliest(logits: Tensor, weights: Tensor, sampling: Sampling) -> Tensor:
    """Zero the weights outside top-k and top-p."""
    count = logits.shape[-1]
    if 0 < sampling.window < count:
        top, ids = logits.topk(sampling.window, dim=-1)
    else:
        top, ids = logits.sort(dim=-1, descending=True)
    last = (sampling.top_k - 1).clamp(0, top.shape[-1] - 1)
    kth = torch.where(sampling.top_k > 0, top.gather(-1, last[:, None])[:, 0], float("-inf"))
    if not sampling.any_top_p:
        return torch.where(logits < kth[:, None], 0, weights)
    top_weights = torch.where(top < kth[:, None], 0, weights.gather(-1, ids))
    weights = torch.where(logits < kth[:, None], 0, weights)
    return _top_p(logits, weights, top, top_weights, sampling.top_p)


def _top_p(logits: Tensor, weights: Tensor, top: Tensor, top_weights: Tensor, p: Tensor) -> Tensor:
    """Zero the weights outside the smallest set of likeliest tokens that reaches `p`.

    Hugging Face sorts upwards and removes while the cumulative probability is at most 1 - p.
    Seen from above: a token stays while those before it weigh less than p of the whole. Of equal
    logits the highest id comes first, as in a stable sort (Hugging Face's is not). `top` [rows, n]
    are the largest logits, falling, and `top_weights` theirs; they may end inside a run of equal
    logits, as that run's members are found in `logits`.
    """
    reach = _share(weights.sum(-1), p).clamp(min=1)[:, None]
    before = top_weights.cumsum(-1) - top_weights
    cut = top.gather(-1, (before < reach).sum(-1, keepdim=True) - 1)
    above = torch.where(top > cut, top_weights, 0).sum(-1, keepdim=True)
    each = torch.where(top == cut, top_weights, 0).amax(-1, keepdim=True).clamp(min=1)
    room = (reach - above + each - 1) // each  # of those that tie at the cut, so many fit
    ties = (logits == cut).cumsum(-1, dtype=torch.int32)
    low = (logits < cut) | ((logits == cut) & (ties <= ties[:, -1:] - room))
    return torch.where(low & (p < 1)[:, None], 0, weights)


def _typical(logits: Tensor, weights: Tensor, p: Tensor) -> Tensor:
    """Zero the weights outside the most typical tokens, of which as few as reach `p` stay.

    Meister et al., "Locally typical sampling", 2022: the nearer a token's information -log(p) is
    to the distribution's entropy, the more typical it is. What is as near as the last one stays.
    """
    kept = logits.masked_fill(weights == 0, float("-inf")).log_softmax(-1)
    information = kept.exp() * kept.neg().clamp(max=torch.finfo(kept.dtype).max)
    # As integers, so that the sum does not depend on how a device splits it.
    entropy = (information * 2.0**WEIGHT_BITS).to(torch.int64).sum(-1) * 2.0**-WEIGHT_BITS
    distance = (kept.neg() - entropy[:, None]).abs()
    nearest, ids = distance.sort(dim=-1)
    typical = weights.gather(-1, ids)
    reach = _share(weights.sum(-1), p).clamp(min=1)[:, None]
    before = typical.cumsum(-1) - typical
    last = nearest.gather(-1, (before < reach).sum(-1, keepdim=True) - 1)
    return torch.where((distance > last) & (p < 1)[:, None], 0, weights)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64[rows]: the first id whose cumulative weight exceeds `uniform` of the whole."""
    cumulative = weights.cumsum(-1)
    share = _share(cumulative[:, -1], uniform)
    # share < whole, and a weight of 0 never moves the sum past it: no masked token, no overrun.
    return torch.searchsorted(cumulative, share[:, None], right=True)[:, 0]


def _share(whole: Tensor, part: Tensor) -> Tensor:
    """`whole` * `part`, rounded down: int64[rows] from int64 below 2**39 and float32 in [0, 1]."""
    return (part * 2.0**DRAW_BITS).to(torch.int64) * whole >> DRAW_BITS


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def bounded_temperature(temperature: float) -> float:
    """Where all that are beyond draw the same."""
    return min(max(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)


def floor_24(part: float) -> float:
    """Rounded down to 24 bits, so that ten tokens of 0.1 reach 0.9 with nine; 0 only for 0."""
    return max(float(part > 0), float(int(part * 2.0**DRAW_BITS))) * 2.0**-DRAW_BITS


def uniform(rows: Sequence[SampleRow], device: torch.device | str) -> Tensor:
    """Each row's random number for its step: float32[rows] in [0, 1)."""
    return torch.from_numpy(uniforms(rows, 1)[0]).to(device)


def uniforms(rows: Sequence[SampleRow], count: int) -> npt.NDArray[np.float32]:
    """Each row's random numbers for its step and those behind it: float32[count, rows]."""
    seeds = np.array([row.seed for row in rows], dtype=np.uint64)
    first = np.array([row.step for row in rows], dtype=np.uint64)
    streams = np.array([row.stream for row in rows], dtype=np.uint64)
    steps = first + np.arange(count, dtype=np.uint64)[:, None]
    own = np.tile(seeds, count), steps.ravel(), np.tile(streams, count)
    return philox.uniform(*own).reshape(steps.shape)


def _banned(rows: Sequence[tuple[int, ...]], device: torch.device | str) -> Tensor:
    width = max(map(len, rows), default=0)
    if not width:
        return torch.empty(0, 0, dtype=torch.int64, device=device)
    padded = [ids + (-1,) * (width - len(ids)) for ids in rows]
    return torch.tensor(padded, dtype=torch.int64, device=device)


def _window(rows: Sequence[SampleRow]) -> int:
    """How many of the largest logits the filters of `rows` need: see `Sampling.window`."""
    filtered = [row for row in rows if row.top_k or row.top_p < 1]
    if not filtered:
        return 0
    if any(row.top_k == 0 for row in filtered):
        return -1
    most = max(row.top_k for row in filtered)
    return next((size for size in WINDOWS if most <= size), -1)
