"""Changes to logits before bans and the draw: bias, penalties, forced tokens.

Meaning and order as in Hugging Face: bias, encoder repetition penalty, repetition penalty, forced
tokens; OpenAI's presence and frequency penalties, which Hugging Face lacks, follow the repetition
penalty. Bans come between the penalties and the forced tokens there. Here they are ids that
`ops.sampling` takes, and those that a forced token overrides are left out before they get there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """What one row's logits undergo in one step, as host data: see `ops.rules`.

    Ids are distinct within a field. Those of `seen` and `prompt` must be in the vocabulary, as
    tokens are that a model reads; others outside are skipped. Penalties of 1 do nothing.

    - `bias`: ids and what is added to their logits, before all else.
    - `prompt`: ids that `encoder_repetition_penalty` > 0 makes likelier (above 1).
    - `seen`: ids that `repetition_penalty` > 0 makes less likely (above 1).
    - `counted`: ids and what is added for presence and frequency, after the penalties.
    - `forced`: unless empty, only these stay, all equal; nothing else in here matters then.
    """

    bias: tuple[tuple[int, float], ...] = ()
    prompt: tuple[int, ...] = ()
    encoder_repetition_penalty: float = 1.0
    seen: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    counted: tuple[tuple[int, float], ...] = ()
    forced: tuple[int, ...] = ()


class _Entries(NamedTuple):
    """`values` float32[n] for the logits at `rows`, `ids`, int64[n] each; no place twice."""

    rows: Tensor
    ids: Tensor
    values: Tensor

    @classmethod
    def of(
        cls,
        entries: Iterable[tuple[int, Sequence[int], float | Sequence[float]]],
        device: torch.device | str,
    ) -> _Entries | None:
        """From rows, the ids in each, and a value for each of these or one for all. None if there
        are no ids. By numpy: a batch of long histories has a hundred thousand."""
        found = [(row, ids, values) for row, ids, values in entries if ids]
        if not found:
            return None
        counts = [len(ids) for _, ids, _ in found]
        rows = np.repeat([row for row, _, _ in found], counts)
        ids = np.concatenate([np.fromiter(own, np.int64, len(own)) for _, own, _ in found])
        values = np.concatenate(
            [
                np.broadcast_to(np.asarray(own, np.float32), n)
                for (_, _, own), n in zip(found, counts, strict=True)
            ]
        )
        return cls(*(torch.from_numpy(part).to(device) for part in (rows, ids, values)))


@dataclass(frozen=True)
class Edits:
    """The edits of one step's rows as tensors; what no row asks for is None.

    `forced` is int64[rows, most], padded with -1; all of a row is padding where nothing is forced.
    """

    bias: _Entries | None
    encoder: _Entries | None
    repetition: _Entries | None
    counted: _Entries | None
    forced: Tensor | None

    @classmethod
    def of(cls, edits: Sequence[Edit | None], device: torch.device | str = "cpu") -> Edits | None:
        """One edit, or None, a row, in order. None if no row has one."""
        own = [(row, edit) for row, edit in enumerate(edits) if edit is not None]
        if not own:
            return None
        return cls(
            bias=_Entries.of(((row, *_columns(edit.bias)) for row, edit in own), device),
            encoder=_Entries.of(
                # Hugging Face multiplies by the inverse as well.
                ((row, edit.prompt, 1 / edit.encoder_repetition_penalty) for row, edit in own),
                device,
            ),
            repetition=_Entries.of(
                ((row, edit.seen, edit.repetition_penalty) for row, edit in own), device
            ),
            counted=_Entries.of(((row, *_columns(edit.counted)) for row, edit in own), device),
            forced=_forced(edits, device),
        )

    def apply(self, logits: Tensor) -> Tensor:
        """A changed copy of `logits` float32[rows, vocab]; rows without an edit stay bitwise.

        -inf stays -inf except where it is forced, and NaN spoils no other row.
        """
        logits = logits.clone()
        _add(logits, self.bias)
        _penalise(logits, self.encoder)
        _penalise(logits, self.repetition)
        _add(logits, self.counted)
        return logits if self.forced is None else _force(logits, self.forced)


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [token for token, _ in pairs], [value for _, value in pairs]


def _add(logits: Tensor, entries: _Entries | None) -> None:
    if entries is None:
        return
    known = entries.ids < logits.shape[-1]
    places = (entries.rows, torch.where(known, entries.ids, 0))
    logits.index_put_(places, torch.where(known, entries.values, 0.0), accumulate=True)


def _penalise(logits: Tensor, entries: _Entries | None) -> None:
    """Divide positive logits, multiply negative ones: a value above 1 always lowers them."""
    if entries is None:
        return
    places = (entries.rows, entries.ids)
    score = logits[places]
    score = torch.where(score < 0, score * entries.values, score / entries.values)
    logits.index_put_(places, score)


def _force(logits: Tensor, forced: Tensor) -> Tensor:
    """0 at the ids of `forced` [rows, most] and -inf elsewhere, in rows that have any."""
    real = (forced >= 0) & (forced < logits.shape[-1])
    value = torch.where(real, 0.0, float("-inf")).to(logits.dtype)
    only = torch.full_like(logits, float("-inf"))
    only = only.scatter_reduce(-1, torch.where(real, forced, 0), value, "amax")
    return torch.where((forced >= 0).any(-1, keepdim=True), only, logits)


def _forced(edits: Sequence[Edit | None], device: torch.device | str) -> Tensor | None:
    ids = [edit.forced if edit is not None else () for edit in edits]
    width = max(map(len, ids))
    if not width:
        return None
    return torch.tensor([own + (-1,) * (width - len(own)) for own in ids], device=device)
