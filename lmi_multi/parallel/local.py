"""Ranks as processes of this host, started by the process that calls them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

from lmi_multi.errors import OptionError, RankError
from lmi_multi.parallel.ranks import Rank, Ranks
from lmi_multi.parallel.serving import leave, serve
from lmi_multi.parallel.watch import Patience

# Of torch's own collectives: whoever calls the ranks notices faults long before.
COLLECTIVE_TIMEOUT = timedelta(seconds=600)

_GUARD = (
    "more than one rank starts processes that import your script again: put the call under "
    '`if __name__ == "__main__":`'
)


class LocalRanks(Ranks):
    """`size` processes, each holding what `build(rank, size)` returned there.

    The caller's process is no rank. They end with it, whatever ends it.
    """

    def __init__(
        self,
        size: int,
        build: Callable[[int, int], Any],
        process_group: str = "gloo",
        answering: int = 0,
    ) -> None:
        if getattr(mp.current_process(), "_inheriting", False):
            raise OptionError(_GUARD)
        super().__init__([], answering)
        self._store = tempfile.TemporaryDirectory(prefix="lmi_multi-ranks-")
        store = Path(self._store.name) / "store"
        threads = max(1, torch.get_num_threads() // size)
        try:
            patience = Patience.building()
            for rank in range(size):
                place = _Place(rank, size, str(store), threads, process_group, os.getpid())
                start = partial(_run, place, build, rank == answering)
                self.ranks.append(_start(rank, start))
            self._collect(patience)
        except RankError as error:
            self.close()
            if " died: exit code " in str(error):  # it could not even say why
                raise RankError(f"{error}. {_GUARD}") from None
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `Ranks.close`."""
        super().close()
        self._store.cleanup()


def _start(rank: int, run: Callable[[Connection], None]) -> Rank:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    name = f"lmi_multi-rank-{rank}"
    process = context.Process(target=run, args=(theirs,), name=name, daemon=True)
    process.start()
    theirs.close()
    return Rank(rank, ours, process)


@dataclass(frozen=True)
class _Place:
    """What a process needs to know to become a rank."""

    rank: int
    size: int
    store: str
    threads: int
    process_group: str
    parent: int

    def join(self) -> None:
        """Join the others."""
        dist.init_process_group(
            self.process_group,
            store=FileStore(self.store, self.size),
            rank=self.rank,
            world_size=self.size,
            timeout=COLLECTIVE_TIMEOUT,
        )

    def leave(self) -> None:
        """End, and remove what the parent cannot remove any more."""
        shutil.rmtree(Path(self.store).parent, ignore_errors=True)
        leave(1)


def _run(place: _Place, build: Callable[[int, int], Any], answers: bool, pipe: Connection) -> None:
    """A rank's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    # Standard output is for the caller's results; Gloo of torch 2.9 and 2.10 greets its peers.
    os.dup2(2, 1)
    torch.set_num_threads(place.threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one host talk over loopback

    def begin() -> Any:
        place.join()
        return build(place.rank, place.size)

    # Another parent's number once the parent has gone.
    serve(pipe, begin, answers, place.leave, alone=lambda: os.getppid() != place.parent)
    leave(0)
