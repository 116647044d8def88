"""The kernel that draws tokens, against the reference on the same device: the same tokens, but for
roundings.

What a token weighs is rounded down to 38 bits of a softmax, whose last bit may differ between the
two: a draw that this decides comes once in some millions. Which tokens are typical depends on the
last bits of two sums more often, as tokens may be as near to the entropy from both sides: there
what either rounding of these draws is allowed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmi_multi import backends
from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Row
from lmi_multi.ops import sampling
from lmi_multi.ops.rules import History, Rules
from lmi_multi.ops.sampling import SampleRow, Sampling, sample

pytestmark = pytest.mark.cuda

VOCABS = (1, 2, 31, 33, 999, 32128, 50400, 1 << 18)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        pytest.skip(f"cuda: {state.reason}")


BLOCK = 16


def some_rules(chance: random.Random, vocab: int) -> Rules | None:
    """Any rules, or none; some ids are none of the vocabulary."""

    def ids(most: int) -> list[int]:
        return [chance.randrange(vocab + 9) for _ in range(chance.randrange(most))]

    if chance.random() < 0.3:
        return None
    return Rules(
        bias=tuple((i, chance.uniform(-9, 9)) for i in dict.fromkeys(ids(9))),
        encoder_repetition_penalty=chance.choice((1.0, 1.0, 1.3, 0.4)),
        repetition_penalty=chance.choice((1.0, 1.2, 3.0, 0.5)),
        presence_penalty=chance.choice((0.0, 0.3, -1.7)),
        frequency_penalty=chance.choice((0.0, 0.1, -0.7)),
        no_repeat_ngram_size=chance.choice((0, 0, 1, 2, 3, 10**12)),
        bad_words=tuple({tuple(ids(3) + [0]) for _ in range(chance.randrange(6))}),
    )


def some_row(chance: random.Random, vocab: int, width: int, encoded: int) -> SampleRow:
    """Any options, and earlier tokens of few ids, so that they repeat."""
    given, step = chance.randrange(1, width // 2), chance.randrange(width // 2)
    few = [chance.randrange(vocab) for _ in range(5)]
    history = History(
        [chance.choice(few) for _ in range(given + step)],
        given,
        [chance.choice(few) for _ in range(encoded)],
    )
    forced = tuple(chance.randrange(vocab + 2) for _ in range(2)) if chance.random() < 0.05 else ()
    rules = some_rules(chance, vocab)
    return SampleRow(
        temperature=chance.choice((0.0, 0.3, 1.0, 1.7, 1e-3, 1e39)),
        top_k=chance.choice((0, 0, 1, 5, 50, 400, vocab, vocab + 7, 2**63 - 1)),
        top_p=chance.choice((1.0, 0.9, 0.5, 0.1, 0.999, 1e-6)),
        min_p=chance.choice((0.0, 0.0, 0.05, 0.3, 1.0)),
        typical_p=chance.choice((1.0, 1.0, 0.9, 0.4, 0.01)),
        seed=chance.getrandbits(64),
        step=step,
        banned=tuple(chance.randrange(vocab + 9) for _ in range(chance.choice((0, 0, 1, 7)))),
        rules=rules,
        forced=forced,
        logprobs=chance.choice((None, None, 0, 1, 5, 20)),
        history=history,
    )


def some_logits(chance: random.Random, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Wide or narrow, with ties where they are rounded, and all alike."""
    scales = torch.tensor([[chance.choice((0.0, 0.01, 1.0, 5.0, 30.0))] for _ in range(rows)])
    logits = torch.randn(rows, vocab) * scales
    for row in range(rows):
        if chance.random() < 0.3:
            logits[row] = (logits[row] * 2).round() / 2
    return logits.to("cuda", dtype)


class Drawn:
    """What the kernel makes of rows at any places of a cache whose blocks are in any order."""

    def __init__(self, logits: Tensor, rows: Sequence[SampleRow], encoded: bool = False) -> None:
        from lmi_multi.backends.cuda.fused_draws import FusedDraws
        from lmi_multi.backends.cuda.inputs import StepInputs

        histories = [row.history or History([0], 1) for row in rows]
        longest = max(len(own.tokens) for own in histories) + 25  # room for what is drawn
        cross = max(len(own.encoded) for own in histories)
        each, across = -(-longest // BLOCK), -(-cross // BLOCK)
        most = len(rows) + 3
        blocks = iter(np.random.default_rng(0).permutation(most * (each + across)).tolist())
        limits = Limits(most, longest + cross + 1, 1, most * (each + across), BLOCK)
        self.inputs = StepInputs(limits, most, encoded, torch.device("cuda"))
        own = [
            Row(
                [past.tokens[-1]],
                len(past.tokens) - 1,
                [next(blocks) for _ in range(each)],
                past.given,
                [next(blocks) for _ in range(across)],
                len(past.encoded) if encoded else 0,
            )
            for past in histories
        ]
        self.draws = FusedDraws(self.inputs)
        assert len(self.draws.fitting(rows)) == len(rows)
        self.inputs.fill(own)
        self.draws.fill(rows)
        self.draws.remember(own, rows)
        self.inputs.feed(own)
        self.inputs.tokens.fill_(-7)
        self.before = [past.tokens[-1] for past in histories]
        self.rows = own
        self.draw(logits)

    def draw(self, logits: Tensor) -> None:
        assert self.draws.draw(logits)
        torch.cuda.synchronize()

    def remembered(self, row: int) -> int:
        """What it now knows as the token that the step was fed."""
        last = self.rows[row].length - 1
        block = self.rows[row].blocks[last // BLOCK]
        return int(self.draws._history[block, last % BLOCK])


def typical_tokens(logits: Tensor, row: SampleRow) -> set[int]:
    """What a row of `logits` may draw, if two float32 sums that its distances depend on, the log of
    all exponentials and the entropy, are rounded otherwise."""
    own = Sampling.of([row], "cuda")
    scaled = sampling.processed(logits[None].float(), own) / own.temperature[:, None]
    weights = sampling._weights(scaled, replace(own, any_typical=False))
    less = torch.where(weights > 0, scaled - scaled.amax(), float("-inf"))
    exact = less.double()
    total = exact.exp().sum().log()
    logs = (exact - total).clamp(min=-1e9)
    entropy = (logs.exp() * -logs).sum()
    found = set()
    for i, j in product(range(-4, 5), repeat=2):
        near = (own.float() for own in (total * (1 + i * 2**-24), entropy * (1 + j * 2**-24)))
        log_of_all, expected = near
        distance = (-(less - log_of_all) - expected).abs()
        nearest, ids = distance.sort(dim=-1)
        chosen = weights.gather(-1, ids)
        reach = sampling._share(weights.sum(-1), own.typical_p).clamp(min=1)
        before = chosen.cumsum(-1) - chosen
        last = nearest.gather(-1, (before < reach[:, None]).sum(-1, keepdim=True) - 1)
        kept = torch.where(distance > last, 0, weights)
        found.add(int(sampling._draw(kept, own.uniform)))
    return found


def check(logits: Tensor, rows: Sequence[SampleRow], what: str, encoded: bool = False) -> None:
    from lmi_multi.backends.cuda.fused_draws import logprob

    if not encoded:
        cleared = [row.history and row.history._replace(encoded=()) for row in rows]
        rows = [row._replace(history=own) for row, own in zip(rows, cleared, strict=True)]
    count, own = len(rows), Drawn(logits, rows, encoded)
    expected = sample(logits.float(), Sampling.of(rows, "cuda"))
    wanted = torch.where(expected.finite, expected.tokens, -1).tolist()
    tokens, inputs = own.inputs.tokens, own.inputs
    for i in range(count):
        other = int(tokens[0, i])
        near = wanted[i] >= 0 and other >= 0 and rows[i].temperature and rows[i].typical_p < 1
        if near and other != wanted[i] and other in typical_tokens(logits[i], rows[i]):
            wanted[i] = other
    wrong = [i for i in range(count) if tokens[0, i] != wanted[i]]
    assert not wrong, f"{what}: {[(int(tokens[0, i]), wanted[i], rows[i]) for i in wrong[:3]]}"
    assert tokens[1].tolist() == [-7] * len(tokens[1])
    assert inputs.ids[:count].tolist() == [max(token, 0) for token in wanted]
    assert inputs.lengths[:count].tolist() == [row.length + 1 for row in own.rows]
    assert inputs.turns[:count].tolist() == [1] * count
    assert [own.remembered(i) for i in range(count)] == own.before
    if expected.logprobs is None:
        return
    told = [i for i, row in enumerate(rows) if row.logprobs is not None]
    scores = logits.float().log_softmax(-1)
    for n, i in enumerate(told):
        if wanted[i] < 0:
            continue
        records = own.draws.records(rows, 0)
        assert records is not None
        record = records[i].numpy()
        found = logprob(wanted[i], rows[i].logprobs or 0, record)
        close = {"rtol": 1e-5, "atol": 2e-5}
        chosen = scores[i, wanted[i]].cpu()
        torch.testing.assert_close(torch.tensor(found.logprob), chosen, **close)
        best = torch.tensor(list(found.top.values()))
        most = min(rows[i].logprobs or 0, logits.shape[1])
        assert len(best) == most
        torch.testing.assert_close(best, expected.logprobs.top[n, :most].cpu(), **close)
        ids = list(found.top)
        torch.testing.assert_close(best, scores[i, ids].cpu(), **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_are_the_references(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    chance = random.Random(f"{vocab} {dtype}")
    for rows in (1, 3, 17, 70):
        encoded = chance.choice((0, 1, 40)) if rows != 3 else 7
        width = chance.choice((4, 30, 700))
        own = [some_row(chance, vocab, width, encoded) for _ in range(rows)]
        logits = some_logits(chance, rows, vocab, dtype)
        check(logits, own, f"{rows} rows", encoded > 0)
        wide = torch.zeros(rows, vocab + 5, dtype=dtype, device="cuda")
        wide[:, :vocab] = logits
        check(wide[:, :vocab], own, f"{rows} rows, padded", encoded > 0)


def test_many_rows() -> None:
    """More than there are teams of blocks, and lists that rows share."""
    torch.manual_seed(0)
    chance = random.Random(0)
    own = [some_row(chance, 999, 30, 5) for _ in range(150)]
    check(some_logits(chance, 300, 999, torch.bfloat16), [*own, *own], "300 rows", encoded=True)


RULES: dict[str, dict[str, Any]] = {
    "bias": {"bias": ((3, 5.0), (32127, -100.0), (40000, 1.0))},
    "encoder": {"encoder_repetition_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.1},
    "frequency": {"frequency_penalty": 0.3},
    "ngram": {"no_repeat_ngram_size": 2},
    "words": {"bad_words": ((5,), (1, 2), (7, 8, 9))},
}


@pytest.mark.parametrize("name", RULES)
def test_rules_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    chance, rules = random.Random(name), Rules(**RULES[name])
    logits = torch.randn(64, 32128, device="cuda") * 3
    for encoded in (0, 33):
        few = [[chance.randrange(12) for _ in range(90)] for _ in range(64)]
        rows = [
            SampleRow(
                float(i % 2), seed=i, step=60, rules=rules, history=History(own, 30, own[:encoded])
            )
            for i, own in enumerate(few)
        ]
        check(logits + 9 * (torch.arange(32128, device="cuda") < 12), rows, name, encoded > 0)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "typical_p"])
def test_options_one_by_one(name: str) -> None:
    values: dict[str, Any] = {
        "temperature": 0.7, "top_k": 40, "top_p": 0.92, "min_p": 0.02, "typical_p": 0.8
    }  # fmt: skip
    torch.manual_seed(0)
    logits = torch.randn(64, 32128, device="cuda") * 3
    for step in range(20):
        given = {"temperature": 1.0, name: values[name]}
        check(logits, [SampleRow(**given, seed=i, step=step) for i in range(64)], name)


def test_what_is_drawn_is_remembered() -> None:
    """Twenty steps, of which the host tells the kernel nothing but random numbers: the same tokens
    as by the reference, which is told all."""
    from lmi_multi.ops.sampling import uniforms

    chance, vocab = random.Random(3), 300
    rules = [some_rules(chance, vocab) for _ in range(9)]
    given = [[chance.randrange(vocab) for _ in range(chance.randrange(1, 40))] for _ in rules]
    past = [list(own) for own in given]

    def now(step: int) -> list[SampleRow]:
        return [
            SampleRow(0.9, 20, seed=i, step=step, rules=of, history=History(own, len(first)))
            for i, (of, own, first) in enumerate(zip(rules, past, given, strict=True))
        ]

    torch.manual_seed(0)
    logits = torch.randn(20, len(rules), vocab, device="cuda") * 2
    own: Drawn | None = None
    for step in range(20):
        told = now(step)
        expected = sample(logits[step], Sampling.of(told, "cuda")).tokens.tolist()
        if own is None:
            own = Drawn(logits[step], told)
        else:
            own.draws.advance(uniforms(told, 1)[0])
            own.draw(logits[step])
        assert own.inputs.tokens[step % 2, : len(rules)].tolist() == expected, step
        for history, token in zip(past, expected, strict=True):
            history.append(token)


def test_unusable_rows_spoil_no_other() -> None:
    logits = torch.randn(6, 999, device="cuda")
    logits[1, 5], logits[2, 7], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 1:] = -torch.inf
    rows = [SampleRow(temperature=1.0, top_p=0.9, seed=i) for i in range(6)]
    check(logits, rows, "unusable")
    check(logits, [row._replace(banned=(0, 5, 7)) for row in rows], "unusable, banned")
    check(logits, [row._replace(logprobs=3) for row in rows], "unusable, log-probabilities")


def test_ids_are_drawn_as_often_as_is_likely() -> None:
    """All draws of one row's seeds, beside its softmax: chi-square over 20,000."""
    torch.manual_seed(0)
    logits = torch.randn(1, 50, device="cuda")
    counts = torch.zeros(50)
    for first in range(0, 20000, 500):
        rows = [SampleRow(temperature=1.0, seed=3, step=first + i) for i in range(500)]
        tokens = Drawn(logits.expand(500, -1), rows).inputs.tokens[0, :500]
        counts += torch.bincount(tokens, minlength=50)
    expected = logits[0].softmax(-1).cpu() * 20000
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < 100  # 49 degrees of freedom: once in 30,000


def test_what_it_does_not_cover_it_refuses() -> None:
    logits = torch.zeros(1, (1 << 18) + 1, device="cuda")
    with pytest.raises(AssertionError):
        Drawn(logits, [SampleRow(temperature=1.0)])
    with pytest.raises(AssertionError):
        Drawn(torch.zeros(9, 4, device="cuda").t(), [SampleRow(temperature=1.0)] * 4)
