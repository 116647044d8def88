"""The shared network as a module with static shapes and its cache as state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.transformer import Transformer
from lmi_multi.models.weights import bind
from lmi_multi.ops.heads import Heads
from lmi_multi.parallel.collectives import Collectives

from .attention import PromptAttention, TableAttention
from .ops import NeuronOps, greedy
from .sampling import draw
from .search import KEPT, likeliest

_PREFIX = "w."


def buffer_name(tensor: str) -> str:
    """The buffer that holds canonical tensor `tensor`; torch allows no dots in it."""
    return (_PREFIX + tensor).replace(".", "__")


class StaticModel(nn.Module):
    """One rank's network; one signature for every graph, in which the given inputs choose.

    State: `k0`, `v0`, `k1` ... [slots, kv_heads, head_dim], one pair a decoder layer, rebound out
    of place by every graph. The weights are buffers that are never rebound.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        collectives: Collectives,
        blocks: int,
        block_size: int,
    ) -> None:
        super().__init__()
        self.spec, self.block_size = spec, block_size
        self._collectives, self._names = collectives, list(tensors)
        self.heads = Heads(spec, collectives.size)
        for name, tensor in tensors.items():
            self.register_buffer(buffer_name(name), tensor)
        shape = (blocks * block_size, self.heads.kv, self.heads.dim)
        dtype = tensors["embed.weight"].dtype
        self.state_names = [f"{kv}{i}" for i in range(spec.decoder_layers) for kv in "kv"]
        for name in self.state_names:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def forward(
        self,
        token_ids: Tensor | None = None,
        positions: Tensor | None = None,
        slots: Tensor | None = None,
        table: Tensor | None = None,
        last: Tensor | None = None,
        temperature: Tensor | None = None,
        how: Tensor | None = None,
        lengths: Tensor | None = None,
        segments: Tensor | None = None,
        cross_table: Tensor | None = None,
        cross_lengths: Tensor | None = None,
        sources: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> list[Tensor]:
        """Encode (`lengths`), or decode; all inputs but `temperature` are int64.

        - encode: `token_ids`, `positions` [rows * n], `lengths` [rows], BERT's `segments`, and
          for encoder-decoders `slots` for the cross-attention's keys and values. Returns hidden
          states float32 [rows * n, hidden] and what the pooler makes of them, if there is one.
        - decode: `token_ids`, `positions`, `slots` [rows * n], `table` [rows, blocks]. With
          `last` [rows] returns greedy tokens int64 [rows], their logits float32 [rows], and the
          logits [rows, vocab] of those tokens; with `temperature` and `how`, see
          `sampling.draw`, a drawn token in place of the greedy one; without `last` hidden states
          and logits of all.
        - decode for beams: also `sources` and `targets` [rows], the blocks to copy before anything
          is written, as two beams part. Returns also what `search.likeliest` does.
        """
        if token_ids is None or positions is None:
            raise TypeError("token_ids and positions are needed")
        if lengths is not None:
            return self._encode(token_ids, positions, lengths, segments, slots)
        if slots is None or table is None:
            raise TypeError("slots and table are needed to decode")
        attention = TableAttention(
            self.heads, self, positions, slots, table, self.block_size, cross_table, cross_lengths
        )
        if sources is not None and targets is not None:
            self._copy(sources, targets)
        network = self._network()
        hidden = network.decode(token_ids, positions, attention)
        if last is None:
            return [network.project_out(hidden).float(), network.logits(hidden)]
        logits = network.logits(hidden.index_select(0, last))
        if temperature is not None and how is not None:
            return [*draw(logits, temperature, how), logits]
        found = [*greedy(logits), logits]
        if sources is not None:
            found += likeliest(logits, min(KEPT, logits.shape[-1]))
        return found

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """See `attention.State`."""
        for name, new in ((f"k{layer}", k), (f"v{layer}", v)):
            setattr(self, name, torch.index_copy(getattr(self, name), 0, slots, new))

    def read(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """See `attention.State`."""
        return self._gather(f"k{layer}", table), self._gather(f"v{layer}", table)

    def _gather(self, name: str, table: Tensor) -> Tensor:
        found = self._blocks(name).index_select(0, table.reshape(-1))
        return found.view(table.shape[0], -1, self.heads.kv, self.heads.dim)

    def _blocks(self, name: str) -> Tensor:
        pool: Tensor = getattr(self, name)
        return pool.view(-1, self.block_size, self.heads.kv, self.heads.dim)

    def _copy(self, sources: Tensor, targets: Tensor) -> None:
        for name in self.state_names:
            pool = self._blocks(name)
            copied = torch.index_copy(pool, 0, targets, pool.index_select(0, sources))
            setattr(self, name, copied.flatten(0, 1))

    def _encode(
        self,
        token_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        segments: Tensor | None,
        slots: Tensor | None,
    ) -> list[Tensor]:
        network = self._network()
        attention = PromptAttention(self.heads, positions, lengths)
        memory = network.encode(token_ids, positions, segments, attention)
        decoder = network.weights.decoder
        if decoder is not None and slots is not None:
            for layer in decoder.layers:
                kv = network.cross_kv(layer, memory).view(-1, 2, self.heads.kv, self.heads.dim)
                self.write(layer.index, slots, kv[:, 0], kv[:, 1])
        hidden = network.project_out(memory)
        first = hidden.view(lengths.shape[0], -1, hidden.shape[-1])[:, 0]
        pooled = network.pool(first)
        return [hidden.float()] + ([] if pooled is None else [pooled.float()])

    def _network(self) -> Transformer:
        """The network over the buffers as they are bound now: on the tracing device."""
        tensors = {name: getattr(self, buffer_name(name)) for name in self._names}
        weights = bind(self.spec, tensors, 0, self._collectives.size)
        return Transformer(self.spec, weights, NeuronOps(), self._collectives)
