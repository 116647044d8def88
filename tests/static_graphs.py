"""CUDA graphs stood in for on a CPU, as static as they are.

A capture notes every operation with the very tensors that it read and wrote, and computes nothing;
a replay does these operations again, on these tensors, whatever has become of the objects that led
to them. So what is replaced where it should be filled is not seen, as on a GPU. What would make the
host wait, or copy from its memory, is refused, and graphs of one pool spoil each other's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import capturing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# They read what the device has computed, or bring something from the host: no capture allows it.
REFUSED = (
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.lift_fresh, aten.lift_fresh_copy,
    aten.masked_select, aten.nonzero,
)  # fmt: skip
SCRATCH_BYTES = 16 << 20  # kernels leave what is larger as they found it
UNWRITTEN = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty)


class NotCapturableError(Exception):
    """What no graph can hold."""


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def spoil(tensor: Tensor) -> None:
    """Fill with what nobody takes for a result."""
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(-77)


class Tape(TorchDispatchMode):
    """The operations while it is entered; afterwards all is as it was before."""

    active: Tape | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.made: list[Tensor] = []  # memory of the pool
        self._before: list[tuple[Tensor, Tensor]] = []
        self._opaque = False

    def __enter__(self) -> Tape:
        Tape.active = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Tape.active = None
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        for tensor in self.made:
            spoil(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._opaque:
            return func(*args, **kwargs)
        kind = func.overloadpacket
        places = tensors(args[1]) if kind in (aten.index, aten.index_put, aten.index_put_) else ()
        if kind in REFUSED or any(place.dtype == torch.bool for place in places):
            raise NotCapturableError(str(func))
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(given[argument.name])
        found = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        own = [t for t in tensors(found) if t.untyped_storage().data_ptr() not in known]
        self.made += own

        def again() -> None:
            if kind in UNWRITTEN:
                return
            for old, new in zip(tensors(found), tensors(func(*args, **kwargs)), strict=True):
                if any(old is tensor for tensor in own):
                    old.copy_(new)

        self.calls.append(again)
        return found

    def kernel(self, work: Callable[..., Any], *given: Any) -> Any:
        """One of our own kernels, which is noted as a whole."""
        for tensor in tensors(given):
            if tensor.nbytes < SCRATCH_BYTES:
                self._keep(tensor)
        self._opaque = True
        try:
            done = work(*given)
        finally:
            self._opaque = False
        if done is not False:
            self.calls.append(lambda: work(*given))
        return done

    def _keep(self, tensor: Tensor) -> None:
        self._opaque, before = True, self._opaque
        self._before.append((tensor, tensor.clone()))
        self._opaque = before


class Graph:
    """What a capture noted; `out` is where every replay leaves its result."""

    graph = None

    def __init__(self, tape: Tape, out: Tensor, pool: list[Graph]) -> None:
        self.tape, self.out, self.pool, self.replays = tape, out, pool, 0
        pool.append(self)

    def replay(self) -> Tensor:
        self.replays += 1
        for other in self.pool:  # one's results may lie where another one computes
            for tensor in other.tape.made:
                spoil(tensor)
        for call in self.tape.calls:
            call()
        return self.out


def capture(body: Callable[[], Tensor], stream: object, pool: list[Graph]) -> Graph:
    """As `capturing.capture`: once before, so that all it sets up is there."""
    body()
    with Tape() as tape:
        out = body()
    return Graph(tape, out, pool)


def static(monkeypatch: pytest.MonkeyPatch, kernels: SimpleNamespace) -> None:
    """Captures become static, with `kernels` as ours, of which each call is one operation."""

    def noted(work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (
            work(*given) if Tape.active is None else Tape.active.kernel(work, *given)
        )

    for name, work in vars(kernels).items():
        setattr(kernels, name, noted(work))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", list)
    monkeypatch.setattr(capturing, "capture", capture)
