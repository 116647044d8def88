"""What torchrun tells the processes that it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmi_multi.errors import OptionError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Job:
    """What torchrun tells a process: its number, how many there are, its number on this host, and
    the address of rank 0's host."""

    rank: int
    size: int
    local_rank: int
    address: str


def read(environ: Mapping[str, str]) -> Job | None:
    """What `environ` tells; None where torchrun has started no others. Raises OptionError."""
    if any(not environ.get(name) for name in VARIABLES):
        return None
    numbers = []
    for name in VARIABLES[:3]:
        text = environ[name]
        if not (text.isascii() and text.isdigit()):
            raise OptionError(f"the variable {name} is {text!r:.80}; allowed: an integer, from 0")
        numbers.append(int(text))
    rank, size, local_rank = numbers
    if size < 2:
        return None
    return Job(rank, size, local_rank, environ["MASTER_ADDR"])
