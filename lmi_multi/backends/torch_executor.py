"""Runs the network eagerly with plain torch operations on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from lmi_multi import progress
from lmi_multi.backends import microbatches
from lmi_multi.backends.base import Limits
from lmi_multi.backends.drawing import draw
from lmi_multi.engine.batch import Batch, Passage, Prompt, Row, StepResult
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.transformer import Transformer
from lmi_multi.models.weights import bind
from lmi_multi.ops import Attention
from lmi_multi.ops.packed import PackedAttention
from lmi_multi.ops.paged import PagedAttention, PagedCache
from lmi_multi.ops.reference import Reference
from lmi_multi.parallel.collectives import Collectives

SCORED_TOKENS = 256


class TorchExecutor:
    """An `Executor` over one rank's tensors, on the device they lie on.

    On a pipeline's last stage its answers are those of the whole network; on the others they mean
    nothing.
    """

    spare_blocks = 0  # of the cache, beyond the limits': they belong to nobody
    clears_blocks = True  # zeroes a block for a new owner

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        limits: Limits,
        ops: Reference,
        collectives: Collectives,
    ) -> None:
        self.limits = limits
        pipeline = collectives.pipeline
        weights = bind(spec, tensors, collectives.rank, collectives.size, pipeline.stage)
        self._network = Transformer(spec, weights, ops, collectives)
        self._device = weights.device
        self._draws = pipeline.last
        # With dynamic rope scaling a token's keys depend on the length that its row has in the end.
        self._staged = pipeline.stage is not None and not spec.length_dependent
        self._heads = ops.heads(spec, collectives.size)
        self._cache = PagedCache(
            self._heads,
            limits.blocks + self.spare_blocks,
            limits.block_size,
            weights.dtype,
            self._device,
            0 if weights.decoder is None else len(weights.decoder.layers),
        )

    @property
    def device(self) -> str:
        """The GPU's name, or how many threads the CPU uses."""
        if self._device.type == "cuda":
            return f"{self._device}, {torch.cuda.get_device_name(self._device)}"
        threads = torch.get_num_threads()
        return f"{threads} thread{'s' if threads > 1 else ''}"

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepResult:
        """See `Executor.step`."""
        self._prepare(batch)
        drawing = [row for row in batch.rows if row.sample is not None]
        logits = self._next_logits(batch.rows)
        return StepResult() if logits is None else StepResult(draw(logits, drawing))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """See `Executor.logits`."""
        if not batch.rows:
            raise ValueError("the batch has no rows")
        self._prepare(batch)
        hidden = self._decode(batch.rows)
        return _fetched(self._network.logits(hidden)) if self._draws else hidden

    @torch.inference_mode()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """See `Executor.encode`."""
        hidden = self._network.project_out(self._encode(prompts))
        if not self._draws:
            return hidden, None
        counts = torch.tensor([len(prompt.token_ids) for prompt in prompts])
        first = counts.cumsum(0) - counts
        pooled = self._network.pool(hidden[first.to(self._device)])
        whole = _fetched(hidden.float())
        return whole, None if pooled is None else _fetched(pooled.float())

    @torch.inference_mode()
    def score(self, passages: Sequence[Passage]) -> Tensor:
        """See `Executor.score`."""
        hidden = self._decode_packed(passages)
        if not self._draws:
            return hidden
        known = [p.token_ids for p in passages]
        targets = torch.tensor([t for own in known for t in (*own[1:], 0)], device=self._device)
        # A few tokens at a time: the scores of a long text over a large vocabulary are large.
        parts = []
        for start in range(0, len(hidden), SCORED_TOKENS):
            part = slice(start, start + SCORED_TOKENS)
            scores = self._network.logits(hidden[part]).log_softmax(-1)
            parts.append(scores.gather(-1, targets[part, None])[:, 0])
        ends = torch.tensor([len(own) for own in known]).cumsum(0) - 1
        keep = torch.ones(len(hidden), dtype=torch.bool)
        keep[ends] = False
        return _fetched(torch.cat(parts))[keep]

    def close(self) -> None:
        """Drop weights and cache, and give a GPU's memory back: the next model is planned with what
        the driver says is free."""
        self.__dict__.pop("_network", None)
        self.__dict__.pop("_cache", None)
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # a GPU that has failed gives nothing back
                torch.cuda.empty_cache()

    def _prepare(self, batch: Batch) -> None:
        """What comes before the rows: blocks zeroed and copied, prompts encoded."""
        fresh = [block for row in batch.rows for block in row.fresh]
        if fresh and self.clears_blocks:
            self._cache.clear(fresh)
        if copies := [pair for row in batch.rows for pair in row.copies]:
            self._copy(copies)
        if batch.prompts:
            self._encode_to_cache(batch.prompts)

    def _copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `PagedCache.copy`."""
        self._cache.copy(pairs)

    def _encode_to_cache(self, prompts: Sequence[Prompt]) -> None:
        """Encode prompts and keep their cross-attention keys and values."""
        self._write_cross(prompts, self._encode(prompts))

    def _decode(self, rows: Sequence[Row]) -> Tensor:
        """The decoder's output [tokens, hidden] for the rows' tokens."""
        if not self._staged:
            return self._decode_part(rows)
        parts = [
            self._decode_part(part)
            for part in microbatches.micro_batches(
                rows, self.limits.block_size, microbatches.TOKENS
            )
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode_part(self, rows: Sequence[Row]) -> Tensor:
        ids = torch.tensor([t for row in rows for t in row.token_ids], device=self._device)
        attention = self._attention(rows)
        return self._network.decode(ids, attention.positions, attention)

    def _next_logits(self, rows: Sequence[Row]) -> Tensor | None:
        """Decode the rows; float32 [drawing rows, vocab], None if no row draws, or not here."""
        if not rows:
            return None
        hidden = self._decode(rows)
        if not self._draws:
            return None
        last = self._last_tokens(rows)
        return self._network.logits(hidden[last]) if len(last) else None

    def _attention(self, rows: Sequence[Row]) -> PagedAttention:
        return PagedAttention(self._cache, rows, self._device)

    def _encode(self, prompts: Sequence[Prompt]) -> Tensor:
        counts = [len(prompt.token_ids) for prompt in prompts]
        ids = torch.tensor([t for p in prompts for t in p.token_ids], device=self._device)
        positions = torch.cat([torch.arange(n) for n in counts]).to(self._device)
        segments = None
        if any(prompt.segment_ids is not None for prompt in prompts):
            segments = torch.tensor(
                [s for p in prompts for s in (p.segment_ids or [0] * len(p.token_ids))],
                device=self._device,
            )
        if self._network.weights.encoder is None:
            causal = PackedAttention(self._heads, counts, positions, causal=True)
            return self._network.decode(ids, positions, causal)
        attention = PackedAttention(self._heads, counts, positions)
        return self._network.encode(ids, positions, segments, attention)

    def _decode_packed(self, passages: Sequence[Passage]) -> Tensor:
        """The decoder's output for known tokens, over encoded prompts where there are any."""
        own = [Prompt(p.token_ids) for p in passages]
        if self._network.weights.encoder is None:
            return self._encode(own)
        memory = self._encode([Prompt(p.encoder_ids or ()) for p in passages])
        counts = [len(p.token_ids) for p in passages]
        ids = torch.tensor([t for p in own for t in p.token_ids], device=self._device)
        positions = torch.cat([torch.arange(n) for n in counts]).to(self._device)
        attention = PackedAttention(
            self._heads,
            counts,
            positions,
            causal=True,
            cross_kv=lambda layer: self._network.cross_kv(layer, memory),
            cross_counts=[len(p.encoder_ids or ()) for p in passages],
        )
        return self._network.decode(ids, positions, self._known(own, attention))

    def _known(self, prompts: Sequence[Prompt], attention: Attention) -> Attention:
        """What attends where `prompts` are a decoder's known tokens, and `attention` would do."""
        return attention

    def _write_cross(self, prompts: Sequence[Prompt], memory: Tensor) -> None:
        """Project the encoded prompts once and keep their cross-attention keys and values."""
        decoder = self._network.weights.decoder
        if decoder is None:
            return
        slots = torch.cat(
            [self._cache.slots(p.cross_blocks, 0, len(p.token_ids)) for p in prompts]
        ).to(self._device)
        for layer in decoder.layers:
            kv = self._network.cross_kv(layer, memory).view(-1, 2, self._heads.kv, self._heads.dim)
            self._cache.write(layer.index, slots, kv[:, 0], kv[:, 1])

    def _last_tokens(self, rows: Sequence[Row]) -> Tensor:
        """Where the last token of every drawing row lies among the packed ones."""
        last, end = [], 0
        for row in rows:
            end += len(row.token_ids)
            if row.sample is not None:
                last.append(end - 1)
        return torch.tensor(last, device=self._device)


@progress.waiting()  # a device's results: they come when other ranks' have come to it
def _fetched(x: Tensor) -> Tensor:
    return x.cpu()
