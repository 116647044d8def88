"""The one network: every family is a spec and weights for this stack."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmi_multi import progress
from lmi_multi.models.schema import Split
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.weights import Layer, Linear, Stack, Weights
from lmi_multi.ops import Attention, Ops
from lmi_multi.parallel.collectives import Collectives


@dataclass(frozen=True)
class Lookup:
    """An embedding that is no more than rows of tables, added up in their type: of `tokens`
    [count, hidden], which begin with token `first`, and of `positions` [most, hidden], if any.

    Ranks that share a vocabulary have zeros for each other's tokens, and add up what they find.
    """

    tokens: Tensor
    first: int
    positions: Tensor | None


class Transformer:
    """One rank's share of the network, on packed tokens: activations are [tokens, features].

    In a pipeline every stage calls the same methods in the same order: `encode` and `decode` take
    activations from the stage before, and hand theirs to the next.

    It holds no state: keys and values live behind the `Attention` that each call is given.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, ops: Ops, collectives: Collectives
    ) -> None:
        self.spec, self.weights, self.ops, self.collectives = spec, weights, ops, collectives
        vocabulary = Split(0, (spec.vocab,), padded=True)
        [(first, stop)] = vocabulary.ranges(collectives.size, collectives.rank)
        self._first_id: int | Tensor = first if weights.first_id is None else weights.first_id
        # The rank's part of the vocabulary; shares are alike, and the last ones filled up.
        self.own_ids = range(min(first, spec.vocab), min(stop, spec.vocab))
        self._pipeline = collectives.pipeline
        wide = spec.wide_residual and weights.dtype == torch.float16
        # Of what runs from layer to layer.
        self.residual_dtype = torch.float32 if wide else weights.dtype

    def encode(
        self, token_ids: Tensor, positions: Tensor, segments: Tensor | None, attention: Attention
    ) -> Tensor:
        """The encoder's output [tokens, hidden] for packed int64 ids and positions [tokens].

        An encoder-decoder's is whole on every stage, an encoder's on the last.
        """
        if self.weights.encoder is None:
            raise ValueError(f"a {self.spec.kind} has no encoder")
        x = self._enter(token_ids, positions, segments)
        x = self._run(self.weights.encoder, x, attention)
        return x if self.weights.decoder is None else self._pipeline.share(x.to(self.weights.dtype))

    def decode(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """The decoder's output [tokens, hidden], before the head: the whole one's on the last
        stage, only its own on another."""
        return self.decode_embedded(self._enter(token_ids, positions, None), attention)

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """What the decoder's layers begin with [tokens, hidden], on the first stage."""
        return self._embed(token_ids, positions, None)

    def lookup(self) -> Lookup | None:
        """What `embed` looks up, where it does nothing else but make that `residual_dtype`."""
        w = self.weights
        more = any(part is not None for part in (w.project_in, w.segments, w.embed_norm))
        if more or w.embed is None or not isinstance(self._first_id, int):
            return None
        return Lookup(w.embed, self._first_id, w.positions)

    def decode_embedded(self, x: Tensor, attention: Attention) -> Tensor:
        """`decode` of what `embed` returned, or the stage before sent."""
        return self._run(self._decoder(), x, attention)

    def decode_layers(self, x: Tensor, attention: Attention) -> Tensor:
        """`decode_embedded` without the norm at the end, which `norm_head` makes up for."""
        return self._layers(self._decoder(), x, attention)

    def with_ops(self, ops: Ops, collectives: Collectives | None = None) -> Transformer:
        """The same network by other operations, and other sums over ranks if any are given."""
        other = copy(self)
        other.ops, other.collectives = ops, collectives or self.collectives
        return other

    def cross_kv(self, layer: Layer, memory: Tensor) -> Tensor:
        """Packed cross-attention keys and values [tokens, 2 * kv_heads * head_dim] of a layer."""
        if layer.cross_kv is None:
            raise ValueError(f"decoder layer {layer.index} has no cross-attention")
        return self.ops.linear(memory, layer.cross_kv)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores float32 [tokens, vocab] of `decode`'s output, whole on every rank of the last
        stage, which alone has them."""
        return self.head(hidden).float()

    def head(self, hidden: Tensor, whole: bool = True) -> Tensor:
        """`logits` in the type that the head's product has; rows may be further apart than they
        are long. Not `whole`: of `own_ids` alone, and nothing is exchanged."""
        head = self._head()
        hidden = self.project_out(hidden)
        if self.spec.logit_scale != 1.0:
            hidden = hidden * self.spec.logit_scale
        return self._gathered(self.ops.linear(hidden, head), whole)

    def norm_head(self, x: Tensor, whole: bool = True) -> Tensor:
        """`head` of what `decode_layers` returned, with the norm in the same operation if nothing
        lies between them."""
        norm, eps = self._decoder().norm, self.spec.norm_eps
        if norm is None:
            return self.head(x, whole)
        if self.weights.project_out is not None or self.spec.logit_scale != 1.0:
            return self.head(self.ops.norm(x, norm, eps), whole)
        return self._gathered(self.ops.norm_linear(x, norm, eps, self._head()), whole)

    def project_out(self, hidden: Tensor) -> Tensor:
        """From the stack's width to the embedding's, where they differ (OPT-350m)."""
        linear = self.weights.project_out
        return hidden if linear is None else self.ops.linear(hidden, linear)

    def pool(self, hidden: Tensor) -> Tensor | None:
        """BERT's pooler on the first token of each row [rows, hidden]; None where there is none."""
        pooler = self.weights.pooler
        return None if pooler is None else torch.tanh(self.ops.linear(hidden, pooler))

    def _enter(self, token_ids: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        """What the rank's first layer reads: [tokens, hidden]."""
        if self._pipeline.first:
            return self._embed(token_ids, positions, segments)
        shape = (len(token_ids), self.spec.hidden)
        x = torch.empty(shape, dtype=self.residual_dtype, device=token_ids.device)
        return self._pipeline.receive(x)

    def _embed(self, token_ids: Tensor, positions: Tensor, segments: Tensor | None) -> Tensor:
        w = self.weights
        x = self._lookup(token_ids)
        if w.project_in is not None:
            x = self.ops.linear(x, w.project_in)
        if w.positions is not None:
            x = x + F.embedding(positions, w.positions)
        if w.segments is not None:
            ids = torch.zeros_like(token_ids) if segments is None else segments
            x = x + F.embedding(ids, w.segments)
        if w.embed_norm is not None:
            x = self.ops.norm(x, w.embed_norm, self.spec.norm_eps)
        return x.to(self.residual_dtype)

    def _lookup(self, token_ids: Tensor) -> Tensor:
        table = self.weights.embed
        if table is None:
            raise ValueError("only a pipeline's first stage embeds")
        if self.collectives.alone:
            return F.embedding(token_ids, table)
        local = token_ids - self._first_id
        mine = (local >= 0) & (local < table.shape[0])
        rows = F.embedding(local.clamp(0, table.shape[0] - 1), table)
        return self.collectives.all_reduce(rows * mine[:, None])

    def _decoder(self) -> Stack:
        if self.weights.decoder is None:
            raise ValueError(f"an {self.spec.kind} has no decoder")
        return self.weights.decoder

    def _head(self) -> Linear:
        if self.weights.head is None:
            raise ValueError("only a pipeline's last stage has a head")
        return self.weights.head

    def _gathered(self, local: Tensor, whole: bool) -> Tensor:
        """Every rank's logits, or this one's; what fills up the vocabulary left out."""
        if not whole:
            return local[:, : len(self.own_ids)]
        return self.collectives.all_gather(local)[:, : self.spec.vocab]

    def _run(self, stack: Stack, x: Tensor, attention: Attention) -> Tensor:
        x = self._layers(stack, x, attention)
        return x if stack.norm is None else self.ops.norm(x, stack.norm, self.spec.norm_eps)

    def _layers(self, stack: Stack, x: Tensor, attention: Attention) -> Tensor:
        block = {"pre": self._pre, "post": self._post, "parallel": self._parallel}[self.spec.block]
        for layer in stack.layers:
            progress.tick()
            x = block(layer, x, attention)
        if not self._pipeline.last:
            self._pipeline.send(x)
        return x

    def _pre(self, layer: Layer, x: Tensor, attention: Attention) -> Tensor:
        """Norm before each sub-layer; encoder-decoders attend to the prompt between the two."""
        ops, eps = self.ops, self.spec.norm_eps
        attended = attention.project_and_attend(layer, x, layer.norm1, eps, ops)
        x = self._add(attended, layer.out, x)
        if layer.cross_q is not None and layer.cross_norm is not None and layer.cross_out:
            attended = attention.project_and_cross_attend(
                layer, x, layer.cross_norm, layer.cross_q, eps, ops
            )
            x = self._add(attended, layer.cross_out, x)
        h = ops.norm_linear(x, layer.norm2, eps, layer.up, self.spec.activation, self.spec.gated)
        return self._add(h.to(self.residual_dtype), layer.down, x)

    def _post(self, layer: Layer, x: Tensor, attention: Attention) -> Tensor:
        """Norm after each residual addition (BERT, OPT-350m)."""
        ops, eps = self.ops, self.spec.norm_eps
        attended = attention.project_and_attend(layer, x, None, eps, ops)
        x = ops.norm(self._add(attended, layer.out, x), layer.norm1, eps)
        h = ops.linear(x, layer.up, self.spec.activation, self.spec.gated)
        return ops.norm(self._add(h, layer.down, x), layer.norm2, eps)

    def _parallel(self, layer: Layer, x: Tensor, attention: Attention) -> Tensor:
        """Attention and FFN read the same input and are added to it together (GPT-J, NeoX)."""
        ops, eps = self.ops, self.spec.norm_eps
        # The FFN first: its product and attention's then follow each other, and have the same x.
        h = ops.norm_linear(x, layer.norm2, eps, layer.up, self.spec.activation, self.spec.gated)
        attended = attention.project_and_attend(layer, x, layer.norm1, eps, ops)
        if self.collectives.alone or (layer.out.bias is not None and layer.down.bias is not None):
            return self._add(h, layer.down, self._add(attended, layer.out, x))
        partial = ops.linear(attended, _unbiased(layer.out))  # one sum over ranks for both
        partial = ops.linear_residual(h, _unbiased(layer.down), partial)
        bias = layer.down.bias if layer.out.bias is None else layer.out.bias
        return self.collectives.add_reduced(x, partial, bias)

    def _add(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """residual + linear(x), where every rank holds a slice of the linear's inputs."""
        if self.collectives.alone:
            return self.ops.linear_residual(x, linear, residual)
        partial = self.ops.linear(x, _unbiased(linear))
        return self.collectives.add_reduced(residual, partial, linear.bias)


def _unbiased(linear: Linear) -> Linear:
    return Linear(linear.weight, None, linear.scale)
