"""Telling a rank that hangs from one that is slow.

While a rank works on a call it says once a second how far it is: `progress.Reading`. One that says
nothing is stopped, or cut off. One that says the same for long does not get on: between two counts
there is one layer's work, or one tensor's, however long the whole call takes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lmi_multi.errors import OptionError
from lmi_multi.progress import Reading

BEAT = 1.0  # seconds between two messages of a rank that works
VARIABLE = "LMI_MULTI_RANK_TIMEOUT"
DEFAULT = 30.0  # seconds
BUILD = 300.0  # seconds for what building has no count for: imports, devices, joining the others
STARTING = 60.0  # seconds that libraries may keep everything else in a process from running
# Seconds that one token may take between two counts: in one layer of 7B parameters at 9 GFLOP/s; on
# a GPU, whose host is done with all layers before it is, in all of them.
TOKEN, GPU_TOKEN = 0.05, 0.005


@dataclass(frozen=True)
class Patience:
    """Seconds until a rank counts as hung: when it is `silent`, or its count `still`; `first`: when
    it has not spoken yet."""

    silent: float
    still: float
    first: float

    @classmethod
    def of(cls, still: float) -> Patience:
        """For a call that may take `still` seconds between two counts, if that is longer than calls
        may anyhow. Raises OptionError for an invalid variable."""
        seconds = configured()
        return cls(seconds / 2, max(seconds, still), seconds / 2)

    @classmethod
    def building(cls) -> Patience:
        """For loading a rank's share of a model."""
        seconds = configured()
        return cls(max(STARTING, seconds / 2), max(BUILD, seconds), max(BUILD, seconds))

    def silence(self, watch: Watch) -> float:
        """How long `watch`'s rank may be silent."""
        return self.silent if watch.spoke else self.first


def configured() -> float:
    """The seconds that `VARIABLE` names, else `DEFAULT`. Raises OptionError."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return DEFAULT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 2 <= seconds <= 86400:
        raise OptionError(f"{VARIABLE} is {text!r:.80}; allowed: seconds, from 2 to 86400")
    return seconds


class Watch:
    """What is known of one rank during one call. Time counts only while the caller looks on: one
    that was itself stopped, or suspended, has not waited."""

    def __init__(self) -> None:
        self.waiting = self.spoke = False
        self.silent = self.still = 0.0
        self._counted = -1

    def heard(self, reading: Reading) -> None:
        """The rank has said how far it is."""
        self.silent, self.spoke = 0.0, True
        if reading.counted != self._counted or reading.waiting != self.waiting:
            self.still = 0.0
        self._counted, self.waiting = reading

    def other_done(self) -> None:
        """Another rank has ended the call: what this one waits for has only now all been done."""
        if self.waiting:
            self.still = 0.0

    def passed(self, seconds: float) -> None:
        """So much time has gone by."""
        self.silent += seconds
        self.still += seconds


def fault(watches: Mapping[int, Watch], patience: Patience) -> str | None:
    """Which ranks hang, in words; None while none does.

    One that waits for others is as slow as they are: it hangs if they all wait, and none gets on.
    """
    silent = [rank for rank, watch in watches.items() if watch.silent > patience.silence(watch)]
    if silent:
        limit = patience.silence(watches[silent[0]])
        return f"{_named(silent)}: nothing was heard for {limit:.0f} s"
    still = [rank for rank, watch in watches.items() if watch.still > patience.still]
    idle = [rank for rank in still if not watches[rank].waiting]
    if idle or (still and len(still) == len(watches)):
        return f"{_named(idle or still)}: no progress for {patience.still:.0f} s"
    return None


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} hangs"
    return f"ranks {', '.join(map(str, ranks))} hang"
