"""A decode step's layers as one persistent kernel: recorded once, run by every step.

Recording is running the network with kernels that note their arguments instead of starting. What
is noted are addresses, so everything stays where it was; what changes from step to step (the
embedded tokens, rotary angles, lengths, block tables) is written there before each run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmi_multi.models.weights import Layer, Linear, Norm
from lmi_multi.parallel.collectives import Peers
from lmi_multi.parallel.pipeline import Pipeline

from .entry import Entered
from .near import PeerMemory

# Rows of a program. Up to so many have x in shared memory, float32's and those that sum over GPUs
# among them, and others in registers, where a block has room for so many features of each.
MOST_STAGED_ROWS, MOST_ROWS = 8, 16
HELD_FEATURES = 4096  # see csrc/step.h
# Bytes of a product's weights, in the mean, from which on a program is the faster one: it wins by
# not letting memory idle, and loses by its barriers. Measured at 2.7 MB (loses), 25
# (16 rows) and 38 to 76 (wins).
LEAST_PRODUCT = 8 << 20
PHASE_BYTES = 256  # see csrc/step.h
# Rows up to which every block normalizes x by itself, in front of a product, of those that have x
# in shared memory. A phase of its own was the faster one at 16 rows, and no faster at 4; between
# them it has not been measured.
FUSED_NORM_ROWS = 4
TERMS_AT_ONCE = 1 << 22  # weights that `norm_terms` widens at a time


class NotCoveredError(Exception):
    """The kernels do not cover this network: its steps cannot be captured, or not so."""


def program_rows(layers: Sequence[Layer]) -> int:
    """Up to how many rows the steps of these layers are best made programs."""
    parts = [value for layer in layers for value in vars(layer).items()]
    # Cross-attention's keys and values are of prompts, not of steps.
    linears = [part for name, part in parts if isinstance(part, Linear) and name != "cross_kv"]
    total = sum(linear.weight.nbytes for linear in linears)
    if not linears or total / len(linears) < LEAST_PRODUCT:
        return 0
    norms = [part for _, part in parts if isinstance(part, Norm)]
    types = {linear.weight.dtype for linear in linears} | {norm.weight.dtype for norm in norms}
    if torch.float32 in types:
        return MOST_STAGED_ROWS
    if all(linear.scale is not None for linear in linears):
        return MOST_ROWS
    # Norms that a product takes itself; where they are phases, cuBLAS is as fast.
    behind = all(_is_behind(norm.weight) for norm in norms)
    return MOST_ROWS if behind else MOST_STAGED_ROWS


class Recorder:
    """Takes the place of the kernels in `CudaOps` and `DecodeAttention`; `RecordedSums`, which
    uses it, that of a network's `Collectives`.

    Raises NotCoveredError for what the step kernel does not do, and where something is read that
    no phase has written: torch computed it, and only once.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.phases: list[Tensor] = []
        self.sums = 0
        self.kept: list[Any] = [inputs]
        self.weight: Tensor | None = None
        self._known = {tensor.data_ptr() for tensor in inputs}
        self._since_barrier: set[int] = set()
        self._normalized: dict[tuple[int, int], Tensor] = {}
        self._dtype = inputs[0].dtype

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> bool:
        """See `lmi_multi::norm`."""
        op = torch.ops.lmi_multi.record_norm
        return self._add(op, (x, weight, bias, eps, out), [x], out)

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
        norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
        residual: Tensor | None, activation: int, gated: bool, splits: int, work: Tensor,
        counters: Tensor, out: Tensor,
    ) -> bool:  # fmt: skip
        """See `lmi_multi::linear`; `splits` is the step's own affair."""
        if norm_weight is not None and not _fuses_norm(x):
            x, norm_weight, norm_bias = self._norm(x, norm_weight, norm_bias, eps), None, None
        terms = None
        if norm_weight is not None and norm_bias is not None and len(x) > MOST_STAGED_ROWS:
            terms = norm_terms(weight, scale, bias, norm_weight, norm_bias)
            if not terms.isfinite().all():  # a bias over a scale that is next to nothing
                raise NotCoveredError
            bias = norm_bias = None
        reads = [x] if residual is None else [x, residual]
        others = (scale, bias, norm_weight, norm_bias, terms, eps, residual, activation, gated)
        self.weight = weight
        op = torch.ops.lmi_multi.record_linear
        return self._add(op, (x, weight, *others, work, counters, out), reads, out)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """x normalized, once for all that want it (GPT-J's attention and FFN)."""
        key = (x.data_ptr(), weight.data_ptr())
        if key not in self._normalized:
            self._normalized[key] = torch.empty_like(x, dtype=weight.dtype)
            self.norm(x, weight, bias, eps, self._normalized[key])
        return self._normalized[key]

    def attention(self, q: Tensor, *others: Any) -> bool:
        """See `lmi_multi::attention`."""
        if q.dtype != self._dtype:
            raise NotCoveredError
        return self._add(torch.ops.lmi_multi.record_attention, (q, *others), [q], others[-1])

    def sum(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Collectives.add_reduced`: x is what the last phase would have written, which sends
        it to the other ranks instead."""
        if not self.phases:
            raise NotCoveredError
        out = torch.empty_like(residual)
        op = torch.ops.lmi_multi.record_sum
        self._add(op, (self.phases[-1], x, residual, bias, out), [residual], out)
        self._known.discard(x.data_ptr())
        self.sums += 1
        return out

    def made(self, tensor: Tensor) -> bool:
        """Whether a phase has written it, or it is an input."""
        return tensor.data_ptr() in self._known

    def _add(
        self,
        op: Callable[..., bool],
        arguments: Sequence[Any],
        reads: Sequence[Tensor],
        out: Tensor,
    ) -> bool:
        """Note a phase. It waits for all that was noted before if it reads any of it that no
        earlier phase has waited for."""
        places = {tensor.data_ptr() for tensor in reads}
        if not places <= self._known:
            raise NotCoveredError
        barrier = bool(places & self._since_barrier)
        phase = torch.zeros(PHASE_BYTES, dtype=torch.uint8)
        if not op(*arguments, barrier, phase):
            raise NotCoveredError
        if barrier:
            self._since_barrier.clear()
        self._since_barrier.add(out.data_ptr())
        self._known.add(out.data_ptr())
        self.phases.append(phase)
        self.kept.append(arguments)
        return True


def norm_terms(
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
) -> Tensor:
    """What a product [outputs, inputs] needs for a LayerNorm behind it: float32 [outputs, 2].

    For a row x of mean m and factor f = 1 / sqrt(variance + eps), W (f (x - m) * w + b) + bias is
    f (W (x * w) - m terms[:, 0]) + terms[:, 1], with W w and W b + bias for terms. Quantized
    weights count as their codes, behind whose results `scale` comes.
    """
    sums = torch.empty(len(weight), 2, dtype=torch.float32, device=weight.device)
    rows = max(1, TERMS_AT_ONCE // weight.size(1))
    for first in range(0, len(weight), rows):
        some = slice(first, first + rows)
        for column, vector in enumerate((norm_weight, norm_bias)):
            sums[some, column] = (weight[some].float() * vector).sum(dim=1)
    if bias is not None:
        sums[:, 1] += bias if scale is None else bias / scale
    return sums


def _fuses_norm(x: Tensor) -> bool:
    """Whether a product takes its norm itself."""
    if len(x) <= MOST_STAGED_ROWS:
        return len(x) <= FUSED_NORM_ROWS
    return _is_behind(x[0])


def _is_behind(row: Tensor) -> bool:
    """Whether the norm of such rows comes behind products of more than MOST_STAGED_ROWS: where a
    row fits and is in range times the norm's weights. See csrc/held.cuh."""
    return row.numel() <= HELD_FEATURES and row.dtype == torch.bfloat16


class RecordedSums:
    """`Collectives` of a network that is recorded: sums behind products, and nothing else."""

    alone = False

    def __init__(self, recorder: Recorder, peers: Peers) -> None:
        self.rank, self.size = peers.rank, peers.size
        self.pipeline: Pipeline = peers.pipeline
        self._recorder = recorder

    def add_reduced(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Collectives.add_reduced`."""
        return self._recorder.sum(residual, x, bias)

    def all_reduce(self, x: Tensor) -> Tensor:
        """No phase does that."""
        raise NotCoveredError

    def all_gather(self, x: Tensor) -> Tensor:
        """No phase does that."""
        raise NotCoveredError


def can_sum(peers: Peers) -> bool:
    """Whether a program can wait for these peers, if there are any."""
    return peers.alone or isinstance(peers.near, PeerMemory)


class StepProgram:
    """Layers recorded for a number of rows.

    `reads` is what every `run` begins with, and `out` what `record` returned, computed anew by
    each. Where there are `peers` they all run theirs at the same time. Raises NotCoveredError.
    """

    def __init__(
        self,
        reads: Entered,
        barrier: Tensor,
        record: Callable[[Recorder], Tensor],
        peers: Peers,
    ) -> None:
        recorder = Recorder([reads.x])
        self.out = record(recorder)
        self.reads, self._barrier, self._kept = reads, barrier, recorder.kept
        room = torch.zeros(1 + len(recorder.phases), PHASE_BYTES, dtype=torch.uint8)
        self._program = torch.cat([room[:1], *(p[None] for p in recorder.phases), room[1:]])
        finish = torch.ops.lmi_multi.finish_program
        if (
            recorder.weight is None
            or not recorder.made(self.out)
            or not finish(self._program, reads.x, recorder.weight, peers.size)
        ):
            raise NotCoveredError
        self._on_device = self._program.to(reads.x.device)
        self._peers, self._memory = peers, peers.near if recorder.sums else None

    def run(self) -> Tensor:
        """The layers' output [rows, hidden] for what is in `reads`; the next run overwrites it."""
        given = self._program, self._on_device, self._barrier
        if isinstance(self._memory, PeerMemory):
            self._memory.run_program(*given, self._peers.silent)
        else:
            torch.ops.lmi_multi.run_program(*given)
        return self.out
