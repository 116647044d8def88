"""How a captured step draws: the sampling options of its rows, where a graph finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmi_multi.engine.batch import Row
from lmi_multi.ops.sampling import Sampled, SampleRow, Sampling, sample

from .inputs import upload

FEWEST_BANNED = 4
COLUMNS = ("temperature", "greedy", "top_k", "top_p", "min_p", "typical_p", "uniform")
FLAGS = ("any_sampled", "any_top_p", "any_min_p", "any_typical", "window")


class DrawKind(NamedTuple):
    """What a captured step must be able to do; see `Sampling`. `banned`: ids a row, at most.
    `fused`: by the kernel that has all options, so that other flags say nothing."""

    any_sampled: bool
    any_top_p: bool
    any_min_p: bool
    any_typical: bool
    window: int
    banned: int
    fused: bool = False


GREEDY = DrawKind(False, False, False, False, window=0, banned=0)  # the likeliest token alone
# All options, by the kernel: see fused_draws.py.
FUSED = DrawKind(True, True, True, True, window=-1, banned=0, fused=True)

Chances = npt.NDArray[np.float32]  # a random number for each row


class DrawInputs:
    """The options of up to `most` rows on the device, for torch's operations: temperature, filters
    and bans."""

    follows = False

    def __init__(self, most: int, device: torch.device) -> None:
        self.most, self._device = most, device
        self._columns = {
            name: column.to(device)
            for name, column in _columns(_sampling([SampleRow(temperature=1.0)], most)).items()
        }
        self._banned: dict[int, Tensor] = {}

    def fitting(self, rows: Sequence[SampleRow | None]) -> list[int]:
        """The numbers of those that a captured step can draw for together."""
        return [i for i, row in enumerate(rows) if row is not None and can_capture(row)]

    def kind(self, rows: Sequence[SampleRow]) -> DrawKind:
        """What these rows need."""
        return GREEDY if is_greedy(rows) else _kind(_sampling(rows, len(rows)))

    def fill(self, rows: Sequence[SampleRow]) -> None:
        """Put the rows' options in the first places."""
        if is_greedy(rows):
            return
        host = _sampling(rows, self.most)
        if host.any_sampled:
            for name, column in _columns(host).items():
                upload(column.numpy(), self._columns[name])
        else:
            self._columns["greedy"].fill_(True)
        if host.any_banned:
            banned = self._banned_of(_width(host))
            padding = (0, banned.shape[1] - host.banned.shape[1])
            padded = torch.nn.functional.pad(host.banned, padding, value=-1)
            upload(padded.numpy(), banned)

    def remember(self, rows: Sequence[Row], draws: Sequence[SampleRow], ahead: int = 0) -> None:
        """Earlier tokens, at which no row looks here."""

    def advance(self, chances: Chances) -> None:
        """Put the rows' next random numbers in the first places; their options have not changed."""
        upload(chances, self._columns["uniform"][: len(chances)])

    def records(self, rows: Sequence[SampleRow], turn: int) -> Tensor | None:
        """Log-probabilities, of which no row here wants any."""
        return None

    def sample(self, logits: Tensor, kind: DrawKind) -> Sampled:
        """Draw for `logits` float32 [rows, vocab], rows in the first places, as `kind` says."""
        rows, banned = len(logits), self._banned_of(kind.banned)
        given: dict[str, Any] = {name: c[:rows] for name, c in self._columns.items()}
        given |= {name: getattr(kind, name) for name in FLAGS}
        given |= {"banned": banned[:rows], "any_banned": kind.banned > 0}
        return sample(logits, Sampling(**given, any_greedy=True, edits=None, wanted=None))

    def _banned_of(self, width: int) -> Tensor:
        if width not in self._banned:
            shape = (self.most, width)
            self._banned[width] = torch.full(shape, -1, dtype=torch.int64, device=self._device)
        return self._banned[width]


def can_capture(row: SampleRow) -> bool:
    """Whether it takes nothing but a row's logits and its options to draw for it."""
    return row.rules is None and not row.forced and row.logprobs is None


def is_greedy(rows: Sequence[SampleRow]) -> bool:
    """Whether the likeliest tokens alone are wanted."""
    return not any(row.temperature or row.banned or not can_capture(row) for row in rows)


def _sampling(rows: Sequence[SampleRow], count: int) -> Sampling:
    """On the host, filled up to `count` rows."""
    return Sampling.of([*rows, *[SampleRow()] * (count - len(rows))])


def _columns(host: Sampling) -> dict[str, Tensor]:
    return {name: getattr(host, name) for name in COLUMNS}


def _width(host: Sampling) -> int:
    """The number of banned ids, rounded up: few different graphs."""
    width = host.banned.shape[1] if host.any_banned else 0
    return max(FEWEST_BANNED, 1 << (width - 1).bit_length()) if width else 0


def _kind(host: Sampling) -> DrawKind:
    flags: dict[str, Any] = {name: getattr(host, name) for name in FLAGS}
    return DrawKind(**flags, banned=_width(host))
