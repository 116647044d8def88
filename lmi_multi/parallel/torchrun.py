"""Ranks that torchrun has started, maybe on several hosts.

Every process calls `lmi_multi.load`. The first, rank 0, listens; the others connect to it and prove
that they know a secret, which they read from the store that torchrun gives all of them. Over these
connections rank 0 calls its ranks as it would call processes of its own. Its own share of the model
lives in a thread, so that its main thread never waits in a collective.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lmi_multi.backends.base import Executor, Limits
from lmi_multi.errors import CapacityError, OptionError, RankError
from lmi_multi.parallel.job import Job, read
from lmi_multi.parallel.local import COLLECTIVE_TIMEOUT
from lmi_multi.parallel.ranks import GRACE, Rank, Ranks, bound
from lmi_multi.parallel.serving import leave, serve
from lmi_multi.parallel.watch import BUILD, Patience

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HANDSHAKE = 10.0  # seconds for one that connects to prove itself
_joined = False


def job(tensor_parallel: int, pipeline_parallel: int) -> Job | None:
    """The processes of torchrun that are to share the model; None where this one is on its own.

    Raises OptionError if there are another number of them than the model is to be split over.
    """
    found = read(os.environ)
    ranks = tensor_parallel * pipeline_parallel
    if found is None or ranks == 1:  # a model of its own in every process
        return None
    if ranks != found.size:
        raise OptionError(
            f"tensor_parallel {tensor_parallel} x pipeline_parallel {pipeline_parallel} is "
            f"{ranks}, but torchrun started {found.size} processes; allowed: {found.size}, or 1, "
            "for a model of its own in every process"
        )
    if _joined:
        raise OptionError(
            "this is the second model that torchrun's processes are to share; allowed: one a run, "
            "as all but the first end with it"
        )
    return found


def own_gpu(count: int) -> int | None:
    """Which of this host's `count` GPUs a model of this process's own takes: that of its number
    here, or the only one that it is shown, which may be others' as well; None where torchrun has
    started no others.

    Raises CapacityError if there are more processes than GPUs, and several of these.
    """
    found = read(os.environ)
    if found is None:
        return None
    return 0 if count == 1 else numbered_gpu(found, count)


def numbered_gpu(job: Job, count: int) -> int:
    """The GPU of this process's number on its host, of `count`. Raises CapacityError."""
    if job.local_rank >= count:
        raise CapacityError(
            f"LOCAL_RANK is {job.local_rank}, but this machine has {count} GPUs; allowed: as many "
            "processes as there are GPUs"
        )
    return job.local_rank


@dataclass(frozen=True)
class _Hello:
    """What a rank says first."""

    rank: int
    host: str
    identity: str
    limits: Limits


def join(
    job: Job,
    answering: int,
    build: Callable[[Limits, int, int], Executor],
    limits: Limits,
    process_group: str,
    identity: str,
) -> tuple[Ranks, Limits]:
    """On rank 0 all ranks, once they have built their shares, and the limits that they agreed on.

    On another rank: serve until rank 0 closes, then raise SystemExit. Raises OptionError if ranks
    differ in `identity`, RankError if one does not come or cannot build its share.
    """
    global _joined
    _joined = True
    if job.address in _LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=BUILD)))
    store = PrefixStore("lmi_multi", store)
    own = partial(_build, job, build, store, process_group)
    hello = _Hello(job.rank, socket.gethostname(), identity, limits)
    if job.rank != 0:
        _serve(job, hello, own, store, answering)
    peers = _gather(job, hello, store)
    agreed = _agreed([hello, *peers.values()])
    ranks = [Rank(h.rank, c, where=f" to {h.host}") for c, h in peers.items()]
    for connection in peers:
        connection.send(agreed)
    return TorchrunRanks(ranks, answering, partial(own, agreed)), agreed


def _agreed(hellos: Sequence[_Hello]) -> Limits:
    """What all have room for."""
    every = [hello.limits for hello in hellos]
    return replace(
        every[0],
        blocks=min(own.blocks for own in every),
        max_idle_tokens=min(own.max_idle_tokens for own in every),
    )


class TorchrunRanks(Ranks):
    """Rank 0's view of them all: `others` than itself, and a thread that `build`s its own share."""

    def __init__(self, others: list[Rank], answering: int, build: Callable[[], Executor]) -> None:
        ours, theirs = Pipe()
        own = threading.Thread(
            target=_run, args=(theirs, build, answering == 0), name="lmi_multi-rank-0", daemon=True
        )
        ranks = [Rank(0, ours, thread=own), *others]
        super().__init__(sorted(ranks, key=lambda rank: rank.number), answering)
        own.start()
        try:
            self._collect(Patience.building())
        except BaseException:
            self.close()
            raise


def _run(pipe: Connection, build: Callable[[], Executor], answers: bool) -> None:
    """Rank 0's own share of the work."""
    if serve(pipe, build, answers, lambda: None) is None:
        dist.destroy_process_group()


def _build(
    job: Job,
    build: Callable[[Limits, int, int], Executor],
    store: Store,
    process_group: str,
    limits: Limits,
) -> Executor:
    dist.init_process_group(
        process_group,
        store=PrefixStore("ranks", store),
        rank=job.rank,
        world_size=job.size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    return build(limits, job.rank, job.size)


# --- rank 0's side of the connections


def _gather(job: Job, own: _Hello, store: Store) -> dict[Connection, _Hello]:
    """A connection to every other rank, and what each one says first."""
    secret = secrets.token_bytes(32)
    try:
        family = socket.getaddrinfo(job.address, None, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((job.address, 0), family=family)
    except OSError as error:
        raise RankError(
            f"rank 0 cannot listen at MASTER_ADDR {job.address}: {error.strerror}; it must be an "
            "address of rank 0's host"
        ) from None
    peers: dict[Connection, _Hello] = {}
    with server, ExitStack() as opened:
        port = server.getsockname()[1]
        store.set("caller", json.dumps([job.address, port, secret.hex()]))
        deadline = time.monotonic() + BUILD
        while len(peers) < job.size - 1:
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                server.settimeout(left)
                connection, hello = _admit(server.accept()[0], secret)
            except TimeoutError:
                here = {0, *(hello.rank for hello in peers.values())}
                late = ", ".join(str(rank) for rank in range(job.size) if rank not in here)
                raise RankError(f"rank {late} did not connect within {BUILD:.0f} s") from None
            except (OSError, EOFError, AuthenticationError):
                continue  # a stranger
            opened.callback(connection.close)
            if hello.identity != own.identity:
                raise OptionError(
                    f"rank {hello.rank} on {hello.host} loads {hello.identity}, but rank 0 loads "
                    f"{own.identity}; allowed: the same everywhere"
                )
            peers[connection] = hello
        opened.pop_all()
    return peers


def _admit(accepted: socket.socket, secret: bytes) -> tuple[Connection, _Hello]:
    """A connection to one that knows the secret. Nothing else that it sends is looked at before."""
    _keep_alive(accepted)
    connection = Connection(accepted.detach())
    try:
        bound(connection, _HANDSHAKE)
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
        return connection, connection.recv()
    except BaseException:
        connection.close()
        raise


def _keep_alive(connection: socket.socket) -> None:
    """A host that is gone without a word ends the connection after 25 s."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# --- another rank's


def _serve(
    job: Job,
    hello: _Hello,
    build: Callable[[Limits], Executor],
    store: Store,
    answering: int,
) -> None:
    """This process's life from here on. Raises SystemExit when rank 0 closes."""
    try:
        address, port, secret = json.loads(store.get("caller"))
    except dist.DistError as error:
        raise RankError(f"rank 0 did not say where it listens: {error}") from None
    own = socket.create_connection((address, port), _HANDSHAKE)
    own.settimeout(None)
    _keep_alive(own)
    connection = Connection(own.detach())
    answer_challenge(connection, bytes.fromhex(secret))
    deliver_challenge(connection, bytes.fromhex(secret))
    connection.send(hello)
    try:
        agreed = connection.recv()
    except (EOFError, OSError):
        raise RankError("rank 0 has ended the run before it began") from None
    failed = serve(connection, partial(build, agreed), answering == job.rank, _orphaned)
    if failed is None:
        dist.destroy_process_group()
        raise SystemExit(0)
    # torchrun ends this host's other ranks once this one has ended: rank 0 first looks who failed,
    # and closes.
    with suppress(OSError):
        connection.poll(2 * GRACE)
    _leave(f"rank {job.rank} failed: {type(failed).__name__}: {failed}")


def _orphaned() -> None:
    _leave("rank 0 is gone")


def _leave(why: str) -> None:
    print(f"error: {why}", file=sys.stderr, flush=True)
    leave(1)
