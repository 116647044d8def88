"""The torch executor with the compiled kernels in it, and decode steps captured as graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from lmi_multi import progress
from lmi_multi.backends.base import Limits
from lmi_multi.backends.drawing import draw_by_row
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.engine.batch import Batch, Continuations, Draw, Passage, Prompt, Row, StepResult
from lmi_multi.models.spec import ModelSpec
from lmi_multi.ops import Attention
from lmi_multi.ops.paged import PagedAttention
from lmi_multi.parallel.collectives import Peers

from .ahead import Ahead, Flight
from .attention import CudaPagedAttention, DecodeAttention
from .entry import Angles
from .graphs import StepGraphs, can_capture
from .inputs import StepInputs, upload
from .ops import CudaOps, Scratch
from .prefill import Prefill
from .prefill_graphs import PrefillGraphs
from .program import MOST_STAGED_ROWS, NotCoveredError, can_sum
from .program import program_rows as best_program_rows
from .searches import Searches

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


def _on_own_gpu(
    call: Callable[Concatenate[CudaExecutor, P], T],
) -> Callable[Concatenate[CudaExecutor, P], T]:
    """Any thread may call, and graphs, streams and events are of the thread's current GPU."""

    @wraps(call)
    def guarded(self: CudaExecutor, /, *given: P.args, **named: P.kwargs) -> T:
        with self._gpu:
            return call(self, *given, **named)

    return guarded


class CudaExecutor(TorchExecutor):
    """`TorchExecutor` by `CudaOps`, with attention by kernels.

    Single-token rows run as captured steps where the network allows (`captured` False: never), and
    ahead of the host where their options do; up to `program_rows` of them have their layers as one
    kernel (None: as many as that pays for). Short prompts run as captured prefills.

    Ranks of one stage do all this together: whatever they decide, they decide by the batch, or
    by what all of them have been told.
    """

    spare_blocks = 1

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        limits: Limits,
        scratch: Scratch,
        collectives: Peers,
        captured: bool = True,
        program_rows: int | None = None,
    ) -> None:
        super().__init__(spec, tensors, limits, CudaOps(scratch), collectives)
        own = self._device
        self._gpu = torch.cuda.device(own) if own.type == "cuda" else nullcontext()
        self._peers = collectives
        self._whole = collectives.pipeline.stage is None
        self._kernel = DecodeAttention(self._cache, scratch)
        self._prefill = Prefill(self._network, self._heads, self._cache)
        self._prefill_graphs: PrefillGraphs | None = None
        self._flight: Flight | None = None
        self._fed: StepGraphs | None = None
        self._ahead: Ahead | None = None
        self._searches: Searches | None = None
        if captured and can_capture(self._network, collectives):
            encoded = spec.kind == "encoder-decoder"
            angles = Angles.of(spec, limits.max_tokens, self._device)
            if not can_sum(collectives):
                program_rows = 0  # no kernel waits for NCCL's sums
            if program_rows is None:
                decoder = self._network.weights.decoder
                program_rows = best_program_rows(decoder.layers if decoder else ())
            if not collectives.alone:
                program_rows = min(program_rows, MOST_STAGED_ROWS)  # with more none sums over GPUs
            program_rows = collectives.least(program_rows)
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._fed, ahead = (
                StepGraphs(
                    self._network,
                    self._kernel,
                    scratch,
                    StepInputs(limits, limits.max_batch, encoded, self._device),
                    angles,
                    program_rows,
                    collectives,
                    stream,
                )
                for _ in range(2)
            )
            self._ahead = Ahead(ahead)
            self._try_captured(angles, stream)
        if self._ahead is not None:
            self.limits = replace(limits, begins_ahead=True, follows=self._ahead.follows)
        if self._fed is not None:
            # Ranks that are not of one kind might find others best. No step may leave out what ran
            # in the last one; and a block is not cleared before it is another's.
            ahead_of_host = (
                self._peers.alone
                and limits.max_step_tokens >= limits.max_batch
                and not self.clears_blocks
            )
            self._searches = Searches(self._fed, self._cache.whole, ahead_of_host)

    @_on_own_gpu
    @torch.inference_mode()
    def step(self, batch: Batch) -> StepResult:
        """See `Executor.step`."""
        self._join()
        rows, last = batch.rows, self._flight
        if self._ahead and last and not batch.prompts and last.is_of(rows):  # most steps
            return self._go_on(self._ahead, last, rows)
        taken = self._searches.taken(rows) if self._searches is not None else {}
        begun_before = {n for i, place in taken.items() for n in range(i, i + place.width)}
        if self._searches is not None and taken:
            self._searches.go_on(rows, taken)
            batch = replace(batch, rows=[r for i, r in enumerate(rows) if i not in begun_before])
        self._prepare(batch)
        if taken and not batch.rows:  # most steps of searches
            self._flight = None
            self._peers.check()
            return StepResult([own.result for own in taken.values()])
        self._flight = None
        places = [last.place(row) if last else None for row in rows]
        if self._ahead is not None and set(places) == {None}:
            last = self._ahead.start(rows)  # then the next step needs no tokens of this one either
            places = [None if last is None else i for i in range(len(rows))]
        # Read before anything else is begun, which may write to the same place.
        found: dict[int, Draw | Continuations] = {i: own.result for i, own in taken.items()}
        rest = [
            i
            for i, place in enumerate(places)
            if place is None and i not in begun_before and rows[i].token_ids
        ]
        tokens = [row.next_token for row in rows]
        if rest:
            found |= self._draw(rest, [rows[i] for i in rest], not taken)
            own = self._agreed(rows, [_token(found.get(i)) for i in range(len(rows))], rest)
            tokens = [row.next_token if t is None else t for row, t in zip(rows, own, strict=True)]
        going = [i for i in range(len(rows)) if places[i] is not None or tokens[i] is not None]
        begun = None
        if self._ahead is not None and going:
            begun = self._ahead.begin(
                [rows[i] for i in going],
                [tokens[i] for i in going],
                [places[i] for i in going],
                last,
            )
        if last is not None and any(place is not None for place in places):
            drawn = last.results()
            found |= {i: drawn[place] for i, place in enumerate(places) if place is not None}
        if begun is not None:
            given = [_token(found[i]) if tokens[i] is None else tokens[i] for i in going]
            begun.fed = [given[n] or 0 for n in begun.numbers]
        self._flight = begun
        self._peers.check()
        return StepResult([found[i] for i in sorted(found)])

    def _go_on(self, ahead: Ahead, last: Flight, rows: Sequence[Row]) -> StepResult:
        """What `step` does where `rows` are all that it is asked for, and those of `last`."""
        self._flight = None
        begun = ahead.begin(rows, [None] * len(rows), range(len(rows)), last)
        drawn = last.results()
        if begun is not None:
            begun.fed = [drawn[n].token for n in begun.numbers]
        self._flight = begun
        self._peers.check()
        return StepResult(drawn)

    def _agreed(
        self, rows: Sequence[Row], tokens: list[int | None], rest: Sequence[int]
    ) -> list[int | None]:
        """The tokens that rank 0 has drawn for the rows `rest`, if any may go on with them at once:
        ranks that went on with different ones would part."""
        if self._ahead is None or self._peers.alone:
            return tokens
        if not self._ahead.going([rows[i] for i in rest if rows[i].sample]):
            return tokens
        own = torch.tensor([-1 if t is None else t for t in tokens], device=self._device)
        with progress.waiting():
            return [t if t >= 0 else None for t in self._peers.broadcast(own).tolist()]

    @_on_own_gpu
    def logits(self, batch: Batch) -> Tensor:
        """See `Executor.logits`."""
        self._join()
        found = super().logits(batch)
        self._peers.check()
        return found

    @_on_own_gpu
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """See `Executor.encode`."""
        self._join()
        found = super().encode(prompts)
        self._peers.check()
        return found

    @_on_own_gpu
    def score(self, passages: Sequence[Passage]) -> Tensor:
        """See `Executor.score`."""
        self._join()
        found = super().score(passages)
        self._peers.check()
        return found

    def _join(self) -> None:
        """Let the caller's stream wait for the step under way: it may be on another caller's, and
        memory is shared."""
        if self._flight is not None:
            self._flight.done.wait()
        if self._searches is not None:
            self._searches.join()

    @_on_own_gpu
    def close(self) -> None:
        """See `TorchExecutor.close`. What a step under way sends to other ranks, they get first;
        and host memory that it writes to becomes nobody else's before it has."""
        if self._ahead is not None:
            with progress.waiting(), suppress(RuntimeError):  # one that has failed writes no more
                self._ahead.wait()
                if self._searches is not None:
                    self._searches.wait()
        self._searches = None
        self._flight = self._fed = self._ahead = self._prefill_graphs = None
        for name in ("_kernel", "_prefill"):
            self.__dict__.pop(name, None)
        super().close()

    def _draw(
        self, numbers: Sequence[int], rows: Sequence[Row], alone: bool
    ) -> dict[int, Draw | Continuations]:
        """Compute rows that nobody has begun; what those that draw get, by their numbers. `alone`:
        there are no searches beside them."""
        vocab = self._network.spec.vocab
        searched = None if self._searches is None else self._searches.run(rows, vocab, alone)
        if searched is not None:
            first = [n for n, row in zip(numbers, rows, strict=True) if row.beams is not None]
            return dict(zip(first, searched, strict=True))
        logits = self._next_logits(rows)
        if logits is None:
            return {}
        drawing = [(n, row) for n, row in zip(numbers, rows, strict=True) if row.sample is not None]
        found = draw_by_row(logits, [row for _, row in drawing])
        return {drawing[i][0]: drawn for i, drawn in found.items()}

    def _next_logits(self, rows: Sequence[Row]) -> Tensor | None:
        """As `TorchExecutor` does, but rows of one token, which come first, by a graph."""
        singles = next((i for i, row in enumerate(rows) if len(row.token_ids) > 1), len(rows))
        step = self._fed.logits(singles) if self._fed is not None and singles else None
        if self._fed is None or step is None:
            return self._prefill_logits(rows)
        # Longer rows first: the graph's logits are read before anything else is replayed.
        others = self._prefill_logits(rows[singles:])
        single = rows[:singles]
        self._fed.inputs.fill(single)
        self._fed.inputs.feed(single)
        logits = step.replay()[:singles]
        drawing = [i for i, row in enumerate(single) if row.sample is not None]
        if len(drawing) < singles:
            logits = logits[torch.tensor(drawing, dtype=torch.int64, device=self._device)]
        parts = [part for part in (logits, others) if part is not None and len(part)]
        return torch.cat(parts) if parts else None

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        on_device = torch.empty((len(pairs), 2), dtype=torch.int32, device=self._device)
        upload(np.array(pairs, dtype=np.int32), on_device)
        if not torch.ops.lmi_multi.copy_blocks(self._cache.whole, on_device):
            super()._copy(pairs)

    @torch.inference_mode()
    def _try_captured(self, angles: Angles | None, stream: torch.cuda.Stream) -> None:
        """Do without captured steps if the kernels do not cover the network."""
        try:
            if self._fed is not None:
                for rows in (1, self.limits.max_batch):
                    self._fed.check(rows)
        except NotCoveredError:
            log.warning("the kernels do not cover this network's attention: it runs uncaptured")
            self._fed = self._ahead = None
        if self._fed is not None and self._peers.least(self._prefill.covers()):
            self._prefill_graphs = PrefillGraphs(
                self._prefill, self.limits, angles, self._device, self._peers, stream
            )
            self.clears_blocks = False  # no kernel reads what lies beyond a row's tokens

    def _prefill_logits(self, rows: Sequence[Row]) -> Tensor | None:
        """As `TorchExecutor` does, but rows of several tokens by a graph or by the kernels."""
        if not self._whole or all(len(row.token_ids) == 1 for row in rows):
            return super()._next_logits(rows)
        if self._prefill_graphs is not None:
            logits = self._prefill_graphs.logits(rows)
            if logits is not None:
                return logits if len(logits) else None
        hidden, last = self._prefill.decode(rows)
        return self._network.logits(hidden.index_select(0, last)) if len(last) else None

    def _decode_part(self, rows: Sequence[Row]) -> Tensor:
        if all(len(row.token_ids) == 1 for row in rows):
            return super()._decode_part(rows)
        return self._prefill.decode(rows)[0]

    def _encode(self, prompts: Sequence[Prompt]) -> Tensor:
        return self._prefill.encode(prompts)

    def _known(self, prompts: Sequence[Prompt], attention: Attention) -> Attention:
        return self._prefill.known(prompts, attention)

    def _encode_to_cache(self, prompts: Sequence[Prompt]) -> None:
        graphs = self._prefill_graphs
        if graphs is None or not graphs.encode_to_cache(prompts):
            self._prefill.encode_to_cache(prompts)

    def _attention(self, rows: Sequence[Row]) -> PagedAttention:
        return CudaPagedAttention(self._cache, rows, self._device, self._kernel)


def _token(drawn: Draw | Continuations | None) -> int | None:
    """The token that goes on, if there is one."""
    return drawn.token if isinstance(drawn, Draw) and drawn.finite else None
