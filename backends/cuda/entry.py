"""How a captured step begins: rows' tokens embedded, and the rotary angles of their positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lmi_multi.models.rope import cos_sin
from lmi_multi.models.spec import ModelSpec, Rope
from lmi_multi.models.transformer import Lookup, Transformer

from .inputs import StepInputs


class Angles:
    """Rotary cosines and sines of every position: float32 [positions, pairs] each."""

    def __init__(self, rope: Rope, positions: int, device: torch.device) -> None:
        every = torch.arange(positions, device=device)
        self.cos, self.sin = (part.contiguous() for part in cos_sin(rope, every, every))

    @classmethod
    def of(cls, spec: ModelSpec, positions: int, device: torch.device) -> Angles | None:
        """Those of a network; None if it does not rotate."""
        rope = spec.position
        return cls(rope, positions, device) if isinstance(rope, Rope) else None

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [rows, pairs] each."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)


class Entered(NamedTuple):
    """What a step's layers begin with: `x` [rows, hidden]; and `cos` and `sin`, float32 [rows,
    pairs] each, where the network rotates."""

    x: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def angles(self) -> tuple[Tensor, Tensor] | None:
        """Both, or neither."""
        return None if self.cos is None or self.sin is None else (self.cos, self.sin)


class Entry:
    """The beginning of one network's steps: by a kernel where embedding is no more than looking up
    (`Transformer.lookup`) and it covers the tables, else by torch. The values are the same."""

    def __init__(self, network: Transformer, inputs: StepInputs, angles: Angles | None) -> None:
        self._network, self._inputs, self._angles = network, inputs, angles
        self._lookup = network.lookup()

    def room(self, rows: int) -> Entered:
        """Memory for what `enter` finds of so many rows, whatever is in it."""
        device = self._inputs.ids.device
        shape, dtype = (rows, self._network.spec.hidden), self._network.residual_dtype
        x = torch.empty(shape, dtype=dtype, device=device)
        if self._angles is None:
            return Entered(x)
        pairs = self._angles.cos.shape[1]
        return Entered(x, *(torch.empty(rows, pairs, device=device) for _ in range(2)))

    def enter(self, rows: int, to: Entered | None = None) -> Entered:
        """The first `rows` rows of the inputs, written `to` where a program reads them."""
        if self._lookup is not None:
            made = to or self.room(rows)
            if self._by_kernel(self._lookup, made):
                return made._replace(x=self._network.collectives.all_reduce(made.x))
        found = self._by_torch(rows)
        if to is None:
            return found
        for own, value in zip(to, found, strict=True):
            if own is not None and value is not None:
                own.copy_(value)
        return to

    def _by_kernel(self, lookup: Lookup, to: Entered) -> bool:
        """False, and nothing done, where the kernel does not cover it."""
        rows, inputs, angles = len(to.x), self._inputs, self._angles
        tables = (None, None) if angles is None else (angles.cos, angles.sin)
        done: bool = torch.ops.lmi_multi.embed(
            inputs.ids[:rows],
            inputs.lengths[:rows],
            lookup.tokens,
            lookup.first,
            lookup.positions,
            *tables,
            *to,
        )
        return done

    def _by_torch(self, rows: int) -> Entered:
        inputs = self._inputs
        positions = inputs.lengths[:rows] - 1
        x = self._network.embed(inputs.ids[:rows], positions)
        return Entered(x) if self._angles is None else Entered(x, *self._angles.at(positions))
