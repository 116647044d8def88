"""Short prefills captured as CUDA graphs: there the host's launches take longer than the GPU."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Prompt, Row
from lmi_multi.models.spec import ModelSpec
from lmi_multi.ops import Attention
from lmi_multi.parallel.collectives import Peers

from .capturing import Captured, capture_together, on_all
from .entry import Angles
from .prefill import Prefill, PrefillAttention
from .prefill_inputs import LONG, SHORT, PrefillInputs, Tiling, have_many_keys
from .program import NotCoveredError

# Tokens of all rows together. Above, the GPU is busy for longer than the launches take; with small
# layers not before their tokens times their weights are so many.
SIZES = (16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
LARGER = (768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 5120, 6144, 7168, 8192)
MOST_WORK = 64 << 30
MOST_ROWS, TOKENS_A_ROW = 16, 64  # so many rows, or one for so many tokens if that is more
MOST_CONTEXT = 4096  # tokens of a row, cached ones included: for more, tables get long
Kind = Literal["rows", "prompts"]

log = logging.getLogger(__name__)


class PrefillGraphs:
    """The prefills of one network over one cache, one graph for each size, and another for many
    keys where there is a kernel for those, made when first wanted. The kernel must cover them all.

    A prefill is filled up to its size with tokens of no row, which are computed for nothing. All
    graphs share one pool of memory: what one computed must be read, or copied, on the stream before
    the next is replayed.
    """

    def __init__(
        self,
        prefill: Prefill,
        limits: Limits,
        angles: Angles | None,
        device: torch.device,
        peers: Peers,
        stream: torch.cuda.Stream,
    ) -> None:
        self._peers, self._stream = peers, stream
        # No more than a step can have, whose memory is planned.
        most = max(limits.largest_step, limits.max_tokens)
        every = sizes(prefill.network.spec, peers.size)
        self.sizes = tuple(size for size in every if size <= most) or every[:1]
        self._prefill, self._angles, self._device = prefill, angles, device
        self._block_size = limits.block_size
        self._most_rows = limits.max_batch
        self._longest, self._context = limits.max_tokens, min(limits.max_tokens, MOST_CONTEXT)
        self._encoded = prefill.network.weights.encoder is not None
        self._pool = torch.cuda.graph_pool_handle()
        # All ranks or none: they capture together.
        self._long = bool(peers.least(prefill.covers(LONG)))
        self._captured: dict[tuple[Kind, int, Tiling], tuple[PrefillInputs, Captured] | None] = {}

    def logits(self, rows: Sequence[Row]) -> Tensor | None:
        """Decode rows: float32 [drawing rows, vocab]. None, and nothing done, if there is no graph
        for them."""
        if self._encoded or max(row.length for row in rows) > self._context:
            return None
        counts = [len(row.token_ids) for row in rows]
        found = self._get("rows", counts, [row.length for row in rows])
        if found is None:
            return None
        inputs, graph = found
        inputs.fill_rows(rows)
        return graph.replay()[: sum(row.sample is not None for row in rows)]

    def encode_to_cache(self, prompts: Sequence[Prompt]) -> bool:
        """As `Prefill.encode_to_cache`. False, and nothing done, if there is no graph for it."""
        if not self._encoded or any(prompt.segment_ids is not None for prompt in prompts):
            return False
        counts = [len(prompt.token_ids) for prompt in prompts]
        found = self._get("prompts", counts, counts)
        if found is None:
            return False
        inputs, graph = found
        inputs.fill_prompts(prompts)
        graph.replay()
        return True

    def _get(
        self, kind: Kind, counts: Sequence[int], lengths: Sequence[int]
    ) -> tuple[PrefillInputs, Captured] | None:
        size = size_of(counts, self.sizes)
        if size is None:
            return None
        dim = self._prefill.network.spec.head_dim
        many = self._long and have_many_keys(counts, lengths, dim)
        key = kind, size, LONG if many else SHORT
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        return self._captured[key]

    def _capture(
        self, kind: Kind, size: int, tiling: Tiling
    ) -> tuple[PrefillInputs, Captured] | None:
        body = self._logits if kind == "rows" else self._encode
        try:
            inputs = on_all(lambda: self._inputs(kind, size, tiling), self._peers)
            captured = capture_together(lambda: body(inputs), self._stream, self._pool, self._peers)
            return inputs, captured
        except torch.OutOfMemoryError:
            log.warning("no memory to capture a prefill of %d tokens: it runs uncaptured", size)
            if not any(self._captured.values()):  # torch gives up a pool that no graph is of
                self._pool = torch.cuda.graph_pool_handle()
        return None

    def _inputs(self, kind: Kind, size: int, tiling: Tiling) -> PrefillInputs:
        longest = self._context if kind == "rows" else min(self._longest, size)
        width = -(-longest // self._block_size)
        rows = min(self._most_rows, rows_of(size))
        inputs = PrefillInputs(size, rows, width, 0, self._block_size, self._device, tiling)
        inputs.clear()
        return inputs

    def _logits(self, inputs: PrefillInputs) -> Tensor:
        inputs.lay_out()
        network = self._prefill.network
        hidden = network.decode(inputs.ids, inputs.positions, self._attention(inputs, None))
        return network.logits(hidden.index_select(0, inputs.last))

    def _encode(self, inputs: PrefillInputs) -> Tensor:
        inputs.lay_out()
        attention = self._attention(inputs, False)
        memory = self._prefill.network.encode(inputs.ids, inputs.positions, None, attention)
        self._prefill.write_cross(memory, inputs)
        return inputs.slots  # nobody wants what was encoded, and the graph would keep it

    def _attention(self, inputs: PrefillInputs, causal: bool | None) -> PrefillAttention:
        angles = None if self._angles is None else self._angles.at(inputs.positions)
        return PrefillAttention(self._prefill.kernel, inputs, angles, causal, _not_covered)


def sizes(spec: ModelSpec, ranks: int) -> tuple[int, ...]:
    """Numbers of tokens that prefills of a network, shared by `ranks`, are captured for."""
    attention = 2 * (spec.heads + spec.kv_heads) * spec.head_dim
    weights = spec.hidden * (attention + (2 + spec.gated) * spec.ffn) // ranks
    return (*SIZES, *(size for size in LARGER if size * weights <= MOST_WORK))


def rows_of(size: int) -> int:
    """The most rows of a captured prefill of `size` tokens."""
    return min(size, max(MOST_ROWS, size // TOKENS_A_ROW))


def size_of(counts: Sequence[int], sizes: Sequence[int]) -> int | None:
    """The first of `sizes` that rows of so many tokens fit in; None if there is none, or if one
    that has room for so many rows would be half empty."""
    total = sum(counts)
    first = bisect_left(sizes, total)
    for size in sizes[first:]:
        if size > sizes[first] and size > 2 * total:
            return None
        if 0 < len(counts) <= rows_of(size):
            return size
    return None


def _not_covered() -> Attention:
    raise NotCoveredError
