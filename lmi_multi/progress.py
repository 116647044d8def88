"""How far this process is: what tells a slow step from one that hangs.

Whoever works long calls `tick` now and then; whoever watches compares two readings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Reading(NamedTuple):
    """`counted` grows while work goes on. `waiting`: for another process's part of it."""

    counted: int
    waiting: bool


class _Progress:
    count = 0
    waiting = False


_own = _Progress()


def tick() -> None:
    """Say that a piece of work has begun: a layer, a tensor."""
    _own.count += 1


def read() -> Reading:
    """How far this process is now."""
    return Reading(_own.count, _own.waiting)


@contextmanager
def waiting() -> Iterator[None]:
    """Around whatever ends only when another process does its part."""
    before = _own.waiting  # it may be in the midst of it already
    _own.count += 1
    _own.waiting = True
    try:
        yield
    finally:
        _own.waiting = before
