"""Small sums between the GPUs of one host, by a kernel over each other's memory.

NCCL takes some 12 us in a graph for the few KiB that a step sums up twice a layer (two H200); the
kernel (csrc/all_reduce.cu) writes them straight to where they are wanted, and adds the residual.
Whether that can be done, ranks find out together when they load: all have opened all others'
memory, and sums of every kind have come out as NCCL's have. Else they stay with NCCL.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmi_multi.errors import RankError, first_line
from lmi_multi.parallel.collectives import TorchCollectives
from lmi_multi.parallel.watch import configured
from lmi_multi.switches import is_off

SWITCH = "LMI_MULTI_CUDA_PEER_MEMORY"
MOST_RANKS, MOST_CHOSEN_ROWS = 8, 2048  # as in csrc/inbox.h
HANDLE_BYTES = 64
CHECK_SECONDS = 10.0  # for a peer to come to a sum while ranks load
# Elements of the sums that are checked: one block's and many, with and without a rest; and so often
# that both halves of the memory are used again.
CHECKED = (4, 1000, 4096, 5124, 65536) * 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a rank is, and what others open its memory by; or `problem`: why they cannot."""

    host: str
    device: int
    handle: bytes
    problem: str


class PeerMemory:
    """`Near` over memory that every rank can write to.

    `inboxes`: int64 [ranks] on the CPU, the addresses by rank as this GPU sees them. A peer that
    has not come to a sum within `seconds` fails it, and all that follow.
    """

    def __init__(self, inboxes: Tensor, rank: int, seconds: float) -> None:
        self._inboxes, self._rank, self.seconds = inboxes, rank, seconds
        self._failed = host_flag()

    def sum(self, x: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> bool:
        """See `Near.sum`: contiguous float32, float16 and bfloat16, each of its own; x of up to
        256 KiB, and rows of whole pieces of 4 bytes. Added up in float32 in the order of ranks and
        rounded once: the same bits on all of them."""
        patience = int(self.seconds * 1e9)
        done: bool = torch.ops.lmi_multi.all_reduce(
            x, residual, bias, self._inboxes, self._rank, patience, self._failed
        )
        return done

    def choose(self, logits: Tensor, first: int, *left: Tensor, silent: bool) -> bool:
        """The likeliest token of up to MOST_CHOSEN_ROWS rows, as `lmi_multi::greedy` does it with
        what is `left`, of ranks that have a part of the logits each: this one's [rows, part], which
        begins with id `first`. Of equal logits the lowest id; the same on all ranks. `silent`:
        nothing is exchanged, and what it finds is of no use."""
        patience = int(self.seconds * 1e9)
        given = first, self._inboxes, self._rank, patience, self._failed
        done: bool = (
            torch.ops.lmi_multi.greedy(logits, *left)
            if silent
            else torch.ops.lmi_multi.greedy_of_ranks(logits, *given, *left)
        )
        return done

    def run_program(
        self, program: Tensor, on_device: Tensor, barrier: Tensor, silent: bool
    ) -> None:
        """Run a step program with sums (see `lmi_multi::run_program`), as all ranks do; `silent`:
        nothing is exchanged, and what it computes is of no use."""
        if silent:
            torch.ops.lmi_multi.run_program(program, on_device, barrier)
            return
        patience = int(self.seconds * 1e9)
        torch.ops.lmi_multi.run_program_of_ranks(
            program, on_device, barrier, self._inboxes, self._rank, patience, self._failed
        )

    def check(self) -> None:
        """See `Peers.check`."""
        if self._failed.item():
            raise RankError(
                f"rank {self._rank} waited for another GPU's part of a sum for {self.seconds:.0f} s"
            )


def host_flag() -> Tensor:
    """int32 [1], 0, in memory of the host that GPUs can write to."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=True)


def connect_memory(peers: TorchCollectives, device: torch.device) -> None:
    """Let small sums go through the GPUs' memory, if they can on all ranks; say so in the log.

    All ranks call this together, each with its own `device`.
    """
    memory, problem = _opened(peers, device)
    level = logging.INFO  # that there is none is common, and nothing to worry about
    if peers.least(memory is not None) and memory is not None:
        problem, level = _checked(memory, peers, device), logging.WARNING
        if peers.least(not problem):
            memory.seconds = max(60.0, 2 * configured())  # after whoever watches ranks
            peers.near = memory
            log.info("rank %d: sums of up to 256 KiB go through the GPUs' memory", peers.rank)
            return
    reason = problem or "another rank has found a reason"
    log.log(level, "rank %d: all sums go through NCCL: %s", peers.rank, reason)


def _opened(peers: TorchCollectives, device: torch.device) -> tuple[PeerMemory | None, str]:
    """This rank's view of all ranks' memory, or why there is none."""
    handle = torch.zeros(HANDLE_BYTES, dtype=torch.uint8)
    own, problem = 0, _unwanted(peers.size)
    if not problem:
        try:
            own = torch.ops.lmi_multi.make_inbox(handle, device.index)
        except RuntimeError as error:
            problem = first_line(error)
    place = Place(_host(), device.index, handle.numpy().tobytes(), problem)
    every = peers.exchange(place)
    problem = _apart(every, place)
    if problem:
        return None, problem
    addresses = [own] * peers.size
    try:
        for rank, other in enumerate(every):
            if rank != peers.rank:
                given = torch.frombuffer(bytearray(other.handle), dtype=torch.uint8)
                addresses[rank] = torch.ops.lmi_multi.open_inbox(given, device.index)
        return PeerMemory(torch.tensor(addresses), peers.rank, CHECK_SECONDS), ""
    except RuntimeError as error:
        return None, first_line(error)


def _unwanted(ranks: int) -> str:
    if is_off(SWITCH):
        return f"switched off ({SWITCH}=0)"
    return f"{ranks} ranks are more than {MOST_RANKS}" if ranks > MOST_RANKS else ""


def _apart(every: list[Place], own: Place) -> str:
    """Why ranks at these places cannot write to each other's memory, as far as can be told."""
    for rank, other in enumerate(every):
        if other.problem:
            return f"rank {rank}: {other.problem}"
        if other.host != own.host:
            return f"rank {rank} is on another host"
        if not _accessible(own.device, other.device):
            return f"cuda:{own.device} cannot access the memory of cuda:{other.device}"
    return ""


def _accessible(device: int, peer: int) -> bool:
    """Whether one GPU can access another's memory; True where opening it will tell, as processes
    may each see other GPUs under these numbers."""
    if device == peer or peer >= torch.cuda.device_count():
        return True
    return torch.cuda.can_device_access_peer(device, peer)


def _checked(memory: PeerMemory, peers: TorchCollectives, device: torch.device) -> str:
    """What is wrong with its sums, if anything. Whatever it finds, a rank takes part in all.

    They are of small integers, which every type holds exactly: in any order the same bits.
    """
    chance, wrong = torch.Generator().manual_seed(peers.rank), []
    refused = ""

    def done(x: Tensor, residual: Tensor | None = None, bias: Tensor | None = None) -> bool:
        nonlocal refused
        try:
            return memory.sum(x, residual, bias)
        except RuntimeError as error:
            refused = first_line(error)
            return False

    for elements in CHECKED:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            own = torch.randint(-8, 9, (elements,), generator=chance).to(device, dtype)
            total, found = peers.all_reduce(own.clone()), own.clone()
            if not done(found) or not torch.equal(found, total):
                wrong.append(f"{elements} elements of {dtype}")
            bias = total[: elements // 2]
            for wide in (dtype, torch.float32):
                residual = total.to(wide, copy=True).view(2, -1)
                expected = residual + (total.view(2, -1) + bias)
                covered = done(own.clone().view(2, -1), residual, bias)
                if not covered or not torch.equal(residual, expected):
                    wrong.append(f"{elements} elements of {dtype} on {wide}")
    if refused:
        return refused
    try:
        memory.check()
    except RankError as error:
        return str(error)
    return f"these came out differently: {', '.join(wrong)}" if wrong else ""


def _host() -> str:
    """What tells this host, as it runs now, from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
