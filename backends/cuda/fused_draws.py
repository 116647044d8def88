"""A captured step's rows as the kernel that draws by all options wants them (csrc/draw.cu)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmi_multi.completion import TokenLogprob
from lmi_multi.engine.batch import Row
from lmi_multi.errors import first_line
from lmi_multi.ops.rules import Rules
from lmi_multi.ops.sampling import SampleRow, bounded_temperature, floor_24, uniforms

from .draws import FUSED, GREEDY, Chances, DrawKind, is_greedy
from .inputs import StepInputs, pinned, upload

# csrc/draw.h
MOST_VOCAB = 1 << 18
TEAMS, TEAM_BYTES = 64, 75808
MOST_LOGPROBS = 20
RECORD = 1 + 2 * MOST_LOGPROBS
OPTIONS = np.dtype(
    [
        *((name, np.float64) for name in ("presence", "frequency")),
        *((name, np.float32) for name in ("temperature", "top_p", "min_p", "typical_p")),
        *((name, np.float32) for name in ("repetition", "prompt")),
        *((name, np.int32) for name in ("top_k", "given", "ngram", "logprobs")),
        *((name, np.int32) for name in ("bias", "biases", "banned", "bans", "forced", "forces")),
        *((name, np.int32) for name in ("words", "word_count")),
    ]
)
LONGEST = 1 << 30  # more tokens than any row has
MOST_LISTED = 1 << 18  # ids and what belongs to them, of all rows
NONE = Rules()
log = logging.getLogger(__name__)


class FusedDraws:
    """Options, ids and earlier tokens of the rows of `inputs`, on the device.

    Earlier tokens lie in blocks as keys and values do. What a row was given is put there when it
    gets its place (`remember`); the kernel adds what it draws. Log-probabilities, where a row wants
    them, come to pinned memory, as tokens do to `inputs.tokens`.
    """

    follows = True

    def __init__(self, inputs: StepInputs) -> None:
        most, device = inputs.most, inputs.ids.device
        self._inputs = inputs
        self._options = torch.zeros(most, OPTIONS.itemsize, dtype=torch.uint8, device=device)
        self._uniform = torch.zeros(most, device=device)
        self._lists = torch.zeros(MOST_LISTED, dtype=torch.int32, device=device)
        blocks = (inputs.spare + 1, inputs.block_size)
        self._history = torch.zeros(blocks, dtype=torch.int32, device=device)
        self._teams = torch.zeros(TEAMS * TEAM_BYTES, dtype=torch.uint8, device=device)
        self._logprobs = pinned((2, most, RECORD), torch.int32)
        self.fill(())

    def works(self, vocab: int) -> bool:
        """Whether this GPU runs the kernel, and has room for so large a vocabulary; tried."""
        try:
            return self.draw(torch.zeros(1, vocab, device=self._uniform.device))
        except RuntimeError as error:
            log.warning("draws are torch's operations: %s", first_line(error))
            return False

    def fitting(self, rows: Sequence[SampleRow | None]) -> list[int]:
        """The numbers of those that a captured step can draw for together: all, but for lists of
        ids that there is no room for."""
        found, places = [], _Places()
        for i, row in enumerate(rows):
            if row is not None and places.find(row) is not None:
                found.append(i)
        return found

    def kind(self, rows: Sequence[SampleRow]) -> DrawKind:
        """What these rows need."""
        return GREEDY if is_greedy(rows) else FUSED

    def fill(self, rows: Sequence[SampleRow]) -> None:
        """Put the rows' options in the first places. Raises ValueError for rows that are not
        `fitting` together."""
        if rows and is_greedy(rows):
            return
        places = _Places()
        options = np.zeros(self._inputs.most, dtype=OPTIONS)
        options[:] = _options(SampleRow(), _EMPTY, 0)
        for i, row in enumerate(rows):
            begin = places.find(row)
            if begin is None:
                raise ValueError(f"there is no room for what row {i} lists")
            options[i] = _options(row, _listed(row), begin)
        upload(options.view(np.uint8).reshape(len(options), -1), self._options)
        if places.ids:
            upload(np.concatenate(places.ids), self._lists[: places.size])
        if rows:
            self.advance(uniforms(rows, 1)[0])

    def advance(self, chances: Chances) -> None:
        """Put the rows' next random numbers in the first places; their options have not changed."""
        upload(chances, self._uniform[: len(chances)])

    def remember(self, rows: Sequence[Row], draws: Sequence[SampleRow], ahead: int = 0) -> None:
        """Put the tokens before those that `rows` are fed, of the step `ahead` of them, where the
        draws look at them."""
        places, tokens = [], []
        for row, draw in zip(rows, draws, strict=True):
            if draw.rules is None or draw.history is None:
                continue
            count = row.start + len(row.token_ids) + ahead - 1
            if draw.rules.reads_tokens:
                places.append(self._slots(row.blocks, count))
                tokens.append(draw.history.tokens[:count])
            if draw.rules.encoder_repetition_penalty != 1:
                places.append(self._slots(row.cross_blocks, row.cross_length))
                tokens.append(draw.history.encoded)
        if not any(map(len, places)):
            return
        known = np.concatenate([np.fromiter(own, np.int64, len(own)) for own in tokens])
        both = np.stack([np.concatenate(places), known])
        device = torch.empty(both.shape, dtype=torch.int64, device=self._history.device)
        upload(both, device)
        self._history.view(-1)[device[0]] = device[1].int()

    def _slots(self, blocks: Sequence[int], count: int) -> npt.NDArray[np.int64]:
        """Where the first `count` tokens of `blocks` lie: block * block_size + offset."""
        size = self._inputs.block_size
        own = np.array(blocks[: -(-count // size)], dtype=np.int64)
        return (own[:, None] * size + np.arange(size)).reshape(-1)[:count]

    def records(self, rows: Sequence[SampleRow], turn: int) -> Tensor | None:
        """Where the step whose tokens go to that half of `inputs.tokens` leaves log-probabilities:
        int32 [rows, RECORD], see `logprob`. None if no row wants any."""
        if all(row.logprobs is None for row in rows):
            return None
        return self._logprobs[turn, : len(rows)]

    def draw(self, logits: Tensor) -> bool:
        """Draw for `logits` [rows, vocab], of any type, into what a step leaves: tokens, ids,
        lengths, turns. False if the kernel does not cover them."""
        inputs, rows = self._inputs, len(logits)
        done: bool = torch.ops.lmi_multi.draw(
            logits,
            self._options[:rows],
            self._uniform[:rows],
            self._lists,
            self._history,
            inputs.table[:rows],
            inputs.cross_table[:rows],
            inputs.cross_lengths[:rows],
            inputs.tokens,
            self._logprobs,
            inputs.ids[:rows],
            inputs.lengths[:rows],
            inputs.live[:rows],
            inputs.turns[:rows],
            self._teams,
        )
        return done


_Key = tuple[Rules | None, tuple[int, ...], tuple[int, ...]]


class _Listed:
    """A row's ids, one list behind the other, and where each begins and how many it has."""

    def __init__(self, row: SampleRow) -> None:
        rules = _rules(row)
        bias = _ids([token for token, _ in rules.bias])
        amounts = np.array([amount for _, amount in rules.bias], dtype=np.float32)
        ends = np.cumsum([0, *map(len, rules.bad_words)]) if rules.bad_words else ()
        words = [token for word in rules.bad_words for token in word]
        parts = [
            np.stack([bias, amounts.view(np.int32)], -1).reshape(-1),
            _ids(row.banned),
            _ids(row.forced),
            np.concatenate([np.array(ends, dtype=np.int32), _ids(words)]),
        ]
        self.ids = np.concatenate(parts)
        self.begins = np.cumsum([0, *map(len, parts[:-1])])
        self.counts = (len(bias), len(row.banned), len(row.forced), len(rules.bad_words))


def _ids(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    """As the kernel has them: what no vocabulary has stays so, however large."""
    return np.clip(np.array(ids, dtype=np.int64), -1, MOST_VOCAB).astype(np.int32)


def _rules(row: SampleRow) -> Rules:
    """Those that the kernel has to follow: a forced token overrides all."""
    return NONE if row.rules is None or row.forced else row.rules


_EMPTY = _Listed(SampleRow())


class _Places:
    """Where lists of rows begin, one behind the other; rows that have the same ids share them."""

    def __init__(self) -> None:
        self.size = 0
        self.ids: list[npt.NDArray[np.int32]] = []
        self._begins: dict[_Key, int] = {(None, (), ()): 0}

    def find(self, row: SampleRow) -> int | None:
        """None if there is no room."""
        key = row.rules, row.banned, row.forced
        begin = self._begins.get(key)
        if begin is None:
            ids = _listed(row).ids
            if self.size + len(ids) <= MOST_LISTED:
                begin = self._begins[key] = self.size
                self.ids.append(ids)
                self.size += len(ids)
        return begin


def _listed(row: SampleRow) -> _Listed:
    if row.rules is None and not row.banned and not row.forced:
        return _EMPTY  # most often
    return _made(row.rules, row.banned, row.forced)


@lru_cache(maxsize=256)
def _made(rules: Rules | None, banned: tuple[int, ...], forced: tuple[int, ...]) -> _Listed:
    """Once for all steps."""
    return _Listed(SampleRow(rules=rules, banned=banned, forced=forced))


def _options(row: SampleRow, listed: _Listed, first: int) -> tuple[float, ...]:
    """A record of OPTIONS, of a row whose lists begin at `first`."""
    rules = _rules(row)
    places = (listed.begins + first).tolist()
    lists = [n for pair in zip(places, listed.counts, strict=True) for n in pair]
    return (
        rules.presence_penalty,
        rules.frequency_penalty,
        bounded_temperature(row.temperature) if row.temperature else 0.0,
        floor_24(row.top_p),
        floor_24(row.min_p),
        floor_24(row.typical_p),
        rules.repetition_penalty,
        1 / rules.encoder_repetition_penalty,
        min(row.top_k, MOST_VOCAB),
        row.history.given if row.history else 0,
        min(rules.no_repeat_ngram_size, LONGEST),
        -1 if row.logprobs is None else row.logprobs,
        *lists,
    )


def logprob(token: int, count: int, record: npt.NDArray[np.int32]) -> TokenLogprob:
    """What the kernel has left of a drawn token, and of `count` likeliest ones."""
    values = record.view(np.float32)
    ids = record[1 : 1 + count].tolist()
    best = zip(ids, values[1 + MOST_LOGPROBS : 1 + MOST_LOGPROBS + count].tolist(), strict=True)
    return TokenLogprob(token, float(values[0]), {own: value for own, value in best if own >= 0})
