"""Decode steps captured as CUDA graphs, one for each number of rows."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lmi_multi.models.transformer import Transformer
from lmi_multi.models.weights import Layer, Linear, Norm
from lmi_multi.ops import Attention, Ops
from lmi_multi.parallel.collectives import Peers
from lmi_multi.switches import is_off

from . import capturing
from .attention import DecodeAttention, Projection, splits
from .beams import BeamInputs, BeamKind
from .capturing import Captured
from .draws import FUSED, GREEDY, DrawInputs, DrawKind
from .entry import Angles, Entered, Entry
from .fused_draws import MOST_VOCAB, FusedDraws
from .inputs import StepInputs
from .near import MOST_CHOSEN_ROWS, PeerMemory
from .ops import MOST_ROWS as OF_ROWS
from .ops import CudaOps, Scratch
from .program import FUSED_NORM_ROWS, NotCoveredError, RecordedSums, Recorder, StepProgram

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# Clients choose among thousands of kinds, and each graph stops all rows while it is made.
MOST_CHOSEN = 32
Kind = DrawKind | BeamKind | None
# Where this is 0, attention is always a kernel of its own.
HEADS = "LMI_MULTI_CUDA_HEADS"
ALWAYS: tuple[Kind, ...] = (None, GREEDY, FUSED)
log = logging.getLogger(__name__)


def sizes(most: int) -> list[int]:
    """Numbers of rows to capture steps for, rising; the last is `most`."""
    return [*SIZES[: bisect_left(SIZES, most)], most]


class CapturedAttention(Attention):
    """`lmi_multi.ops.Attention` for rows of `inputs` that have `entered`, by the kernels alone;
    with the product before it `in_one` kernel where there is one.

    Raises NotCoveredError in the first layer that they cannot do.
    """

    def __init__(
        self,
        kernel: DecodeAttention,
        inputs: StepInputs,
        entered: Entered,
        blocks: int = 2,
        in_one: bool = False,
    ) -> None:
        rows = len(entered.x)
        parts = splits(kernel.heads, rows, inputs.ids.device, blocks)
        self._kernel, self._angles, self._in_one = kernel, entered.angles, in_one
        self._where, self._cross = inputs.where(rows, parts), inputs.cross_where(rows, parts)

    def project_and_attend(
        self, layer: Layer, x: Tensor, norm: Norm | None, eps: float, ops: Ops
    ) -> Tensor:
        """See `Attention.project_and_attend`."""
        if self._in_one:
            made = Projection(x, layer.qkv, norm, eps)
            out = self._kernel.extend(layer, made, self._where, self._angles)
            if out is not None:
                return out
        return super().project_and_attend(layer, x, norm, eps, ops)

    def project_and_cross_attend(
        self, layer: Layer, x: Tensor, norm: Norm, linear: Linear, eps: float, ops: Ops
    ) -> Tensor:
        """See `Attention.project_and_cross_attend`."""
        if self._in_one:
            out = self._kernel.read(layer, Projection(x, linear, norm, eps), self._cross)
            if out is not None:
                return out
        return super().project_and_cross_attend(layer, x, norm, linear, eps, ops)

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """See `Attention.attend`."""
        return _covered(self._kernel.extend(layer, qkv, self._where, self._angles))

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """See `Attention.cross_attend`."""
        return _covered(self._kernel.read(layer, q, self._cross))


class StepGraphs:
    """The steps of one network over one cache, each captured when it is first wanted.

    All graphs share one pool of memory: what one computed must be read, or copied, on the stream
    before the next is replayed. They are captured on `stream`: cuBLAS has a workspace for each.
    """

    def __init__(
        self,
        network: Transformer,
        kernel: DecodeAttention,
        scratch: Scratch,
        inputs: StepInputs,
        angles: Angles | None,
        most_program_rows: int,
        peers: Peers,
        stream: torch.cuda.Stream,
    ) -> None:
        self._peers, self._stream, self.inputs = peers, stream, inputs
        self.beams = BeamInputs(inputs)
        self._network, self._kernel, self._scratch = network, kernel, scratch
        self._sizes = sizes(inputs.most)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, Kind], Captured | None] = {}
        self._full = False
        self._programs: dict[int, StepProgram | None] = {}
        self._entry, self._most_program_rows = Entry(network, inputs, angles), most_program_rows
        self._in_one = not is_off(HEADS)

    @cached_property
    def draws(self) -> DrawInputs | FusedDraws:
        """What steps draw by: made when it is first wanted, as not all graphs draw."""
        vocab = self._network.spec.vocab
        # By the kernel ranks might draw apart, if their GPUs differ in a last bit.
        if self._peers.alone and vocab <= MOST_VOCAB:
            fused = FusedDraws(self.inputs)
            if fused.works(vocab):
                return fused
        return DrawInputs(self.inputs.most, self.inputs.ids.device)

    def check(self, rows: int) -> None:
        """Raise NotCoveredError, on all ranks, if the kernels do not cover a step of so many
        rows. Ranks find out together, by capturing it; one by itself is ready sooner without."""
        if not self._peers.alone:
            self.logits(rows)
            return
        try:
            capturing.run(lambda: self._logits(self.size(rows)), self._stream)
        except torch.OutOfMemoryError:  # there may be some when it is wanted
            log.warning("no memory to try a step of %d rows", rows)

    def logits(self, rows: int) -> Captured | None:
        """A step that ends with the logits: float32 [size >= rows, vocab]. None if it cannot be
        had: memory is short."""
        size = self.size(rows)
        return self._get(size, None, lambda: self._logits(size))

    def drawing(self, rows: int, kind: DrawKind) -> Captured | None:
        """A step that draws by `draws` and leaves its tokens as the next step's inputs.

        Its result: int64 [size >= rows], the tokens, -1 where the logits were unusable; of GREEDY
        and those fused, which write them there themselves, `inputs.tokens`. None if it cannot be
        had: memory is short, or there are too many graphs.
        """
        size = self.size(rows)
        if kind == GREEDY:
            return self._get(size, kind, lambda: self._greedy(size))
        return self._get(size, kind, lambda: self._sampled(size, kind))

    def searching(self, rows: int, kind: BeamKind) -> Captured | None:
        """A step that ends with what `beams` finds, those searches that `rows` belong to first:
        `beams.found`, or, where the kernel does not cover them, what `beams.best` returns. None as
        for `drawing`."""
        size = self.size(rows)
        return self._get(size, kind, lambda: self._searched(size, kind))

    def size(self, rows: int) -> int:
        """Of the smallest step that so many rows fit in."""
        return self._sizes[bisect_left(self._sizes, rows)]

    def _logits(self, size: int) -> Tensor:
        return self._scores(size).float()

    def _searched(self, size: int, kind: BeamKind) -> Tensor:
        scores = self._scores(size)
        found = self.beams.step(scores, kind, self._scratch)
        return self.beams.best(scores.float(), kind) if found is None else found

    def _scores(self, size: int, whole: bool = True) -> Tensor:
        """A step's logits, in the type that the head's product has; see `Transformer.head`."""
        program = self._program(size)
        entered = self._entry.enter(size, None if program is None else program.reads)
        if program is not None:
            return self._head(program.run(), whole)
        attention = CapturedAttention(self._kernel, self.inputs, entered, in_one=self._in_one)
        return self._head(self._layers(self._network, entered.x, attention), whole)

    def _layers(self, network: Transformer, x: Tensor, attention: CapturedAttention) -> Tensor:
        """What `_head` takes: for few rows the norm between is the head's affair."""
        if len(x) <= FUSED_NORM_ROWS:
            return network.decode_layers(x, attention)
        return network.decode_embedded(x, attention)

    def _head(self, hidden: Tensor, whole: bool) -> Tensor:
        if len(hidden) <= FUSED_NORM_ROWS:
            return self._network.norm_head(hidden, whole)
        return self._network.head(hidden, whole)

    def _program(self, size: int) -> StepProgram | None:
        """The layers for so many rows; None if they are no single kernel's."""
        if size > self._most_program_rows:
            return None
        if size not in self._programs:
            self._programs[size] = self._tried(size)
        return self._programs[size]

    def _agree_on_program(self, size: int) -> None:
        """Make the layers for `size` rows a single kernel on all ranks, or on none: before anything
        is captured, as one that waits for peers must not wait for those that go kernel by kernel.

        Raises torch.OutOfMemoryError on all ranks."""
        if self._peers.alone or size > self._most_program_rows or size in self._programs:
            return

        def prepare() -> bool:
            with self._peers.muted():
                capturing.run(lambda: self._logits(size), self._stream)
            return self._programs[size] is not None

        try:
            made = capturing.on_all(prepare, self._peers)
        except (torch.OutOfMemoryError, NotCoveredError):
            self._programs.pop(size, None)  # as on the rank that has got none
            raise
        if not self._peers.least(made):
            self._programs[size] = None

    def _tried(self, size: int) -> StepProgram | None:
        """A program that has run once: a GPU that is shared may refuse to start all its blocks."""
        try:
            program = self._record(self._entry.room(size))
            self._entry.enter(size, program.reads)
            program.run()
        except NotCoveredError:
            log.debug("a step of %d rows is not covered by the step kernel", size)
            return None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("a step's layers run kernel by kernel: %s", str(error).splitlines()[0])
            return None
        return program

    def _record(self, reads: Entered) -> StepProgram:
        def record(recorder: Recorder) -> Tensor:
            most = dict.fromkeys(OF_ROWS, len(reads.x))  # of every type of weights
            sums = None if self._peers.alone else RecordedSums(recorder, self._peers)
            network = self._network.with_ops(CudaOps(self._scratch, most, recorder), sums)
            kernel = self._kernel.with_kernels(recorder)
            attention = CapturedAttention(kernel, self.inputs, reads, blocks=1)
            return self._layers(network, reads.x, attention)

        return StepProgram(reads, self._scratch.barrier, record, self._peers)

    def _greedy(self, size: int) -> Tensor:
        inputs, scratch, near = self.inputs, self._scratch, self._peers.near
        left = (inputs.tokens, *self._advanced(size), inputs.turns[:size], scratch.work)
        if isinstance(near, PeerMemory) and size <= MOST_CHOSEN_ROWS:
            # A token of each rank's part, and not all their logits, goes from GPU to GPU.
            scores, first = self._scores(size, whole=False), self._network.own_ids.start
            silent = self._peers.silent
            done = near.choose(scores, first, *left, scratch.counters, silent=silent)
        else:
            scores = self._scores(size)
            done = torch.ops.lmi_multi.greedy(scores, *left, scratch.counters)
        return _covered(inputs.tokens if done else None)

    def _sampled(self, size: int, kind: DrawKind) -> Tensor:
        if isinstance(self.draws, FusedDraws):
            done = self.draws.draw(self._scores(size))
            return _covered(self.inputs.tokens if done else None)
        ids, lengths, live = self._advanced(size)
        found = self.draws.sample(self._logits(size), kind)
        # Ranks have the same logits, and the same number to draw by; but if GPUs differ, so may
        # the probabilities in their last bits, and ranks that went on differently would part.
        drawn = self._peers.broadcast(torch.where(found.finite, found.tokens, -1))
        ids.copy_(drawn.clamp(min=0))
        lengths.add_(live)
        return drawn

    def _advanced(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a step that draws changes for the next one, and by how much the lengths grow."""
        return self.inputs.ids[:size], self.inputs.lengths[:size], self.inputs.live[:size]

    def _has_most(self) -> bool:
        """Whether there are as many graphs of chosen kinds as there may be; says so once."""
        made = [kind for (_, kind), graph in self._captured.items() if graph is not None]
        full = len([kind for kind in made if kind not in ALWAYS]) >= MOST_CHOSEN
        if full and not self._full:
            log.warning("there are %d kinds of sampled steps: others run uncaptured", MOST_CHOSEN)
            self._full = True
        return full

    def _get(self, size: int, kind: Kind, body: Callable[[], Tensor]) -> Captured | None:
        key = (size, kind)
        if key not in self._captured:
            if kind not in ALWAYS and self._has_most():
                return None
            kept = self.inputs.ids.clone()  # a step may be under way, and the next need its tokens
            self.inputs.clear()
            try:
                self._agree_on_program(size)
                self._captured[key] = capturing.capture_together(
                    body, self._stream, self._pool, self._peers
                )
            except torch.OutOfMemoryError:
                log.warning("no memory to capture a step of %d rows: it runs uncaptured", size)
                self._captured[key] = None
                if not any(self._captured.values()):  # torch gives up a pool that no graph is of
                    self._pool = torch.cuda.graph_pool_handle()
            finally:
                self.inputs.ids.copy_(kept)
        return self._captured[key]


def can_capture(network: Transformer, peers: Peers) -> bool:
    """Whether steps of this network depend on nothing but the rows' tokens and lengths, and a graph
    can hold what ranks exchange in them. Stages' work in turn, as the host hands it on."""
    spec = network.spec
    held = peers.capturable and peers.pipeline.stage is None
    return held and spec.decoder_layers > 0 and not spec.length_dependent


def _covered(out: Tensor | None) -> Tensor:
    if out is None:
        raise NotCoveredError
    return out
