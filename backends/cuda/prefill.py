"""Prefill by compiled kernels: rows of several tokens over the paged cache, and encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lmi_multi.engine.batch import Prompt, Row
from lmi_multi.models.bias import relative_buckets
from lmi_multi.models.spec import RelativeBias
from lmi_multi.models.transformer import Transformer
from lmi_multi.models.weights import Layer
from lmi_multi.ops import Attention
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.packed import PackedAttention
from lmi_multi.ops.paged import PagedAttention, PagedCache

from .prefill_inputs import LONG, SHORT, PrefillInputs, Tiling, tiling_of

Angles = tuple[Tensor, Tensor] | None


class DistanceBiases:
    """Relative-bias tables by distance instead of by bucket, kept for the steps to come."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def of(self, table: Tensor, position: RelativeBias, causal: bool) -> Tensor:
        """float32 [heads, distances], by how far the query is behind the key: from 0 or, if not
        `causal`, -max_distance to max_distance. Beyond, the bias stays that of the ends."""
        key = id(table), causal
        if key not in self._known:
            most = position.max_distance
            behind = torch.arange(0 if causal else -most, most + 1, device=table.device)
            buckets = relative_buckets(-behind, position, bidirectional=not causal)
            by_distance = table.float()[buckets].t().contiguous()
            self._known[key] = table, by_distance  # holds the table, so that its id stays its own
        return self._known[key][1]


class PrefillKernel:
    """The prefill attention kernel over one cache. Every method returns None where it does not
    cover a case, and has then changed nothing."""

    def __init__(self, heads: Heads, cache: PagedCache) -> None:
        self.heads, self.cache = heads, cache
        self._biases = DistanceBiases()

    def extend(
        self, layer: Layer, qkv: Tensor, inputs: PrefillInputs, angles: Angles
    ) -> Tensor | None:
        """Store the rows' new keys and values, then attend to all they have. Overwrites qkv."""
        k, v = self.cache.k[layer.index], self.cache.v[layer.index]
        return self._self(layer, qkv, inputs, angles, True, k, v, inputs.slots, inputs.table)

    def packed(
        self, layer: Layer, qkv: Tensor, inputs: PrefillInputs, angles: Angles, causal: bool
    ) -> Tensor | None:
        """Every row attends to itself; nothing is stored. Overwrites qkv."""
        return self._self(layer, qkv, inputs, angles, causal, None, None, None, None)

    def read(self, layer: Layer, q: Tensor, inputs: PrefillInputs) -> Tensor | None:
        """Attend to the rows' encoded prompts."""
        heads, out = self.heads, torch.empty_like(q)
        done = torch.ops.lmi_multi.prefill(
            *(q, self.cache.k[layer.index], self.cache.v[layer.index], None, inputs.cross_table),
            *(inputs.starts, inputs.cross_lengths, inputs.tiles, *inputs.tiling, heads.q, heads.kv),
            *(None, None, 0.0, None, None, None, None, False, 0, layer.scale, out),
        )
        return out if done else None

    def store(self, layer: Layer, kv: Tensor, slots: Tensor) -> bool:
        """Store packed keys and values [tokens, 2 * kv_heads * dim] at `slots` int32 [tokens]."""
        cache = self.cache
        done: bool = torch.ops.lmi_multi.write_kv(
            kv, cache.k[layer.index], cache.v[layer.index], slots
        )
        return done

    def _self(
        self, layer: Layer, qkv: Tensor, inputs: PrefillInputs, angles: Angles, causal: bool,
        k: Tensor | None, v: Tensor | None, slots: Tensor | None, table: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        heads = self.heads
        cos, sin = (None, None) if angles is None else angles
        bias = slopes = None
        if layer.position_bias is not None:
            position = heads.spec.position
            if isinstance(position, RelativeBias):
                bias = self._biases.of(layer.position_bias, position, causal)
            else:
                slopes = layer.position_bias
        q_norm = layer.q_norm.weight if layer.q_norm else None
        k_norm = layer.k_norm.weight if layer.k_norm else None
        out = qkv.new_empty((qkv.shape[0], heads.q * heads.dim))
        done = torch.ops.lmi_multi.prefill(
            *(qkv, k, v, slots, table, inputs.starts, inputs.lengths, inputs.tiles),
            *(*inputs.tiling, heads.q, heads.kv, q_norm, k_norm, heads.spec.norm_eps),
            *(cos, sin, bias, slopes),
            *(causal, layer.window if causal else 0, layer.scale, out),
        )
        return out if done else None


class PrefillAttention(Attention):
    """`Attention` of one step by the kernel; from the first layer on that it does not cover, by
    what `otherwise` makes. `causal` None: rows over the cache; else packed rows over themselves,
    whose cross-attention is what `otherwise` makes of it.
    """

    def __init__(
        self,
        kernel: PrefillKernel,
        inputs: PrefillInputs,
        angles: Angles,
        causal: bool | None,
        otherwise: Callable[[], Attention],
    ) -> None:
        self._kernel, self._inputs, self._angles = kernel, inputs, angles
        self._causal, self._make = causal, otherwise
        self._other: Attention | None = None
        self._covered = True

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """See `Attention.attend`."""
        out, kernel = None, self._kernel
        if self._covered:
            if self._causal is None:
                out = kernel.extend(layer, qkv, self._inputs, self._angles)
            else:
                out = kernel.packed(layer, qkv, self._inputs, self._angles, self._causal)
            self._covered = out is not None
        return self._otherwise().attend(layer, qkv) if out is None else out

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """See `Attention.cross_attend`."""
        out = None
        if self._covered and self._causal is None:
            out = self._kernel.read(layer, q, self._inputs)
            self._covered = out is not None
        return self._otherwise().cross_attend(layer, q) if out is None else out

    def _otherwise(self) -> Attention:
        if self._other is None:
            self._other = self._make()
        return self._other


class Prefill:
    """Encodes prompts and decodes rows of several tokens of one network over one cache.

    Everything that the host knows of a step reaches the device in one copy that nobody waits for.
    """

    def __init__(self, network: Transformer, heads: Heads, cache: PagedCache) -> None:
        self.network, self.kernel = network, PrefillKernel(heads, cache)
        self._heads, self._cache = heads, cache
        self._device = network.weights.device

    def covers(self, tiling: Tiling = SHORT) -> bool:
        """Whether the kernel does the attention of every layer, by asking it to do nothing."""
        weights, heads = self.network.weights, self._heads
        inputs = PrefillInputs(1, 1, 1, 1, self._cache.block_size, self._device, tiling)
        inputs.clear()
        angles = heads.angles(inputs.positions, inputs.reach)
        width, dtype = (heads.q + 2 * heads.kv) * heads.dim, weights.dtype
        qkv = torch.zeros((1, width), dtype=dtype, device=self._device)
        encoder = weights.encoder.layers if weights.encoder else ()
        decoder = weights.decoder.layers if weights.decoder else ()
        return all(
            self.kernel.packed(layer, qkv, inputs, angles, False) is not None for layer in encoder
        ) and all(self.kernel.extend(layer, qkv, inputs, angles) is not None for layer in decoder)

    def decode(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """The decoder's output [tokens, hidden], and where in it the rows that draw end: int32."""
        counts, lengths = [len(row.token_ids) for row in rows], [row.length for row in rows]
        tiling = self._tiling(counts, lengths)
        inputs = PrefillInputs.of_rows(rows, self._cache.block_size, self._device, tiling)
        attention = PrefillAttention(
            self.kernel,
            inputs,
            self._heads.angles(inputs.positions, inputs.reach),
            None,
            lambda: PagedAttention(self._cache, rows, self._device),
        )
        drawing = sum(row.sample is not None for row in rows)
        hidden = self.network.decode(inputs.ids, inputs.positions, attention)
        return hidden, inputs.last[:drawing]

    def encode(self, prompts: Sequence[Prompt]) -> Tensor:
        """The encoder's output [tokens, hidden], or that of a decoder without one."""
        return self._encode(prompts, self._inputs(prompts))

    def known(self, prompts: Sequence[Prompt], otherwise: Attention) -> Attention:
        """What attends where `prompts` are a decoder's known tokens: the kernel, in place of
        `otherwise`, to themselves."""
        inputs = self._inputs(prompts)
        angles = self._heads.angles(inputs.positions, inputs.reach)
        return PrefillAttention(self.kernel, inputs, angles, True, lambda: otherwise)

    def encode_to_cache(self, prompts: Sequence[Prompt]) -> None:
        """Encode, and store every decoder layer's cross-attention keys and values."""
        inputs = self._inputs(prompts)
        self.write_cross(self._encode(prompts, inputs), inputs)

    def write_cross(self, memory: Tensor, inputs: PrefillInputs) -> None:
        """Project what was encoded to cross-attention keys and values, and store them."""
        decoder = self.network.weights.decoder
        for layer in decoder.layers if decoder is not None else ():
            kv = self.network.cross_kv(layer, memory)
            if not self.kernel.store(layer, kv, inputs.slots):
                k, v = kv.view(-1, 2, self._heads.kv, self._heads.dim).unbind(1)
                self._cache.write(layer.index, inputs.slots.long(), k, v)

    def _inputs(self, prompts: Sequence[Prompt]) -> PrefillInputs:
        counts = [len(prompt.token_ids) for prompt in prompts]
        tiling = self._tiling(counts, counts)
        return PrefillInputs.of_prompts(prompts, self._cache.block_size, self._device, tiling)

    def _tiling(self, counts: Sequence[int], lengths: Sequence[int]) -> Tiling:
        heads = self._heads
        return tiling_of(counts, lengths, heads.dim, self._long)

    @cached_property
    def _long(self) -> bool:
        """Whether this GPU has the kernel for many keys, and that covers the network."""
        return self.covers(LONG)

    def _encode(self, prompts: Sequence[Prompt], inputs: PrefillInputs) -> Tensor:
        causal = self.network.weights.encoder is None
        attention = PrefillAttention(
            self.kernel,
            inputs,
            self._heads.angles(inputs.positions, inputs.reach),
            causal,
            lambda: PackedAttention(
                self._heads, [len(p.token_ids) for p in prompts], inputs.positions, causal
            ),
        )
        if causal:
            return self.network.decode(inputs.ids, inputs.positions, attention)
        segments = self._segments(prompts)
        return self.network.encode(inputs.ids, inputs.positions, segments, attention)

    def _segments(self, prompts: Sequence[Prompt]) -> Tensor | None:
        if all(prompt.segment_ids is None for prompt in prompts):
            return None
        ids = [s for p in prompts for s in (p.segment_ids or [0] * len(p.token_ids))]
        return torch.tensor(ids, device=self._device)
