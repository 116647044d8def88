"""Decoding in plain torch operations over static caches, a CUDA graph a step: what a user of torch
alone would write, as a peer of decode steps.

Prompts of a batch have one length, so nothing is padded. The residual stream is added to in place,
by the products themselves. A step has no host work: what it reads and writes follows from a
position on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Answer, Peer, Task
from benchmarks.random_model import random_model
from benchmarks.shapes import DTYPES, SHAPES
from lmi_multi.models.bias import relative_buckets
from lmi_multi.models.rope import cos_sin
from lmi_multi.models.spec import Activation, ModelSpec, RelativeBias, Rope
from lmi_multi.models.weights import Layer, Linear, Norm, Stack, Weights, bind

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
ALIGNED = 8  # torch's attention takes masks as they are if rows of keys are multiples of this


def lacking(spec: ModelSpec, dtype: torch.dtype) -> str:
    """What of a network is not covered here; empty if everything is."""
    position = spec.position
    rotary, relative = isinstance(position, Rope), isinstance(position, RelativeBias)
    missing = {
        f"{position.type} positions": not (rotary or relative),
        "a relative bias of each layer": isinstance(position, RelativeBias) and position.per_layer,
        "dynamic rotary scaling": spec.length_dependent,
        "sliding windows": any(spec.windows),
        "norms after the residual": spec.block == "post",
        "a float32 residual": spec.wide_residual and dtype == torch.float16,
    }
    return ", ".join(what for what, wanted in missing.items() if wanted)


@dataclass(frozen=True)
class _Place:
    """Where the tokens of a call are: positions int64 [n], what is added to scores [1, heads or 1,
    1, length] (None: n tokens see themselves and those before), and rotary factors."""

    at: Tensor
    mask: Tensor | None
    angles: tuple[Tensor, Tensor] | None


class Graphed:
    """Greedy answers of `rows` prompts of `prompt` tokens, with up to `tokens` new ones; `capture`:
    as CUDA graphs. Raises SystemExit for a network that it does not cover.

    `history` int64 [length + 1, rows] has the token of each position, `cache` [layers, 2, rows, kv
    heads, length, head_dim] keys and values, `cross` the same of encoded prompts.
    """

    @torch.inference_mode()
    def __init__(
        self, spec: ModelSpec, weights: Weights, rows: int, prompt: int, tokens: int, capture: bool
    ) -> None:
        decoder, embed, head = weights.decoder, weights.embed, weights.head
        if decoder is None or embed is None or head is None:
            raise ValueError(f"a {spec.kind} does not generate")
        normed = any(layer.q_norm is not None for layer in decoder.layers)
        lack = "norms of queries and keys" if normed else lacking(spec, weights.dtype)
        if lack:
            raise SystemExit(f"the peer in plain torch does not have {lack}")
        self.spec, self.weights, self.rows = spec, weights, rows
        self.decoder, self.embed, self.head = decoder, embed, head
        self.activate = ACTIVATIONS[spec.activation]
        # The first new token's place: behind the prompt, or behind the token that starts answers.
        self.start = prompt if weights.encoder is None else 1
        length = -(-(self.start + tokens) // ALIGNED) * ALIGNED
        stored = (len(decoder.layers), 2, rows, spec.kv_heads)
        self.cache = embed.new_zeros(*stored, length, spec.head_dim)
        self.prompts = embed.new_zeros(rows, prompt, dtype=torch.int64)
        self.history = embed.new_zeros(length + 1, rows, dtype=torch.int64)
        self.position = embed.new_zeros(1, dtype=torch.int64)
        self.range = torch.arange(length, device=weights.device)
        self.angles = _angles(spec, self.range)
        masks = _bias(spec, decoder, self.range, causal=True).to(weights.dtype)
        self.masks = masks.transpose(0, 2).contiguous()  # [length, heads or 1, 1, length]
        if weights.encoder is not None:
            self.cross = embed.new_zeros(*stored, prompt, spec.head_dim)
            places = torch.arange(prompt, device=weights.device)
            bias = _bias(spec, weights.encoder, places, causal=False)
            self.encoder_bias = bias.to(weights.dtype).contiguous()
        self.begin, self.step = self._begin, self._step
        if capture:
            self._capture()

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """`count` tokens for each prompt: token ids [rows][count]."""
        self.prompts.copy_(torch.tensor(prompts))
        self.begin()
        # A decoder's prefill ends with its first token.
        for _ in range(count - (self.weights.encoder is None)):
            self.step()
        answers: list[list[int]] = self.history[self.start : self.start + count].t().tolist()
        return answers

    def _capture(self) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries choose and load kernels at first, which no graph can
                self._begin()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.begin, self.step = _captured(self._begin), _captured(self._step)

    def _begin(self) -> None:
        """What comes before the first step, which then is at `position`."""
        self.position.fill_(self.start - (self.weights.encoder is not None))
        x = F.embedding(self.prompts, self.embed).flatten(0, 1)
        if self.weights.encoder is not None:
            self._encode(self.weights.encoder, x)
            return
        at, angles = self.range[: self.start], self.angles
        if angles is not None:
            angles = angles[0][: self.start], angles[1][: self.start]
        x = self._decode(x, _Place(at, None, angles))
        self._choose(x.view(self.rows, -1, x.shape[-1])[:, -1])

    def _step(self) -> None:
        """A token of every row."""
        at, angles = self.position, self.angles
        if angles is not None:
            angles = angles[0].index_select(0, at), angles[1].index_select(0, at)
        ids = self.history.index_select(0, at)[0]
        place = _Place(at, self.masks.index_select(0, at), angles)
        x = self._decode(F.embedding(ids, self.embed), place)
        self.position.add_(1)
        self._choose(x)

    def _choose(self, x: Tensor) -> None:
        """The best token behind each row's last one, x [rows, hidden], is that of `position`."""
        x = self._normed(x, self.decoder.norm)
        if self.spec.logit_scale != 1:
            x = x * self.spec.logit_scale
        best = _linear(x, self.head).argmax(-1, keepdim=True)
        self.history.index_copy_(0, self.position, best.t())

    def _encode(self, encoder: Stack, x: Tensor) -> None:
        """x [rows * prompt, hidden] through the encoder, and from there into `cross`."""
        for layer in encoder.layers:
            q, (k, v) = self._project(layer, self._normed(x, layer.norm1), None)
            out = F.scaled_dot_product_attention(q, k, v, self.encoder_bias, scale=layer.scale)
            _add(x, _joined(out), layer.out)
            self._feed_forward(layer, x)
        memory = self._normed(x, encoder.norm)
        for layer, cross in zip(self.decoder.layers, self.cross, strict=True):
            if layer.cross_kv is not None:
                cross.copy_(self._pair(_linear(memory, layer.cross_kv)))

    def _decode(self, x: Tensor, place: _Place) -> Tensor:
        """x [rows * n, hidden] through the decoder's layers; it is overwritten."""
        for layer in self.decoder.layers:
            normed = self._normed(x, layer.norm1)
            attended = self._attend(layer, normed, place)
            if self.spec.block == "parallel":
                same = layer.norm2 is layer.norm1
                self._feed_forward(layer, x, normed if same else None)
                _add(x, attended, layer.out)
                continue
            _add(x, attended, layer.out)
            if layer.cross_q is not None and layer.cross_out is not None:
                q = _linear(self._normed(x, layer.cross_norm), layer.cross_q)
                q = q.view(self.rows, -1, self.spec.heads, self.spec.head_dim).transpose(1, 2)
                k, v = self.cross[layer.index]
                out = F.scaled_dot_product_attention(q, k, v, scale=layer.scale)
                _add(x, _joined(out), layer.cross_out)
            self._feed_forward(layer, x)
        return x

    def _attend(self, layer: Layer, x: Tensor, place: _Place) -> Tensor:
        """[rows * n, heads * head_dim], with the keys and values stored."""
        q, own = self._project(layer, x, place.angles)
        cache = self.cache[layer.index]
        cache.index_copy_(3, place.at, own)
        k, v = own if place.mask is None else cache
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            place.mask,
            is_causal=place.mask is None,
            scale=layer.scale,
            enable_gqa=self.spec.heads != self.spec.kv_heads,
        )
        return _joined(out)

    def _project(
        self, layer: Layer, x: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Queries [rows, heads, n, head_dim], keys and values [2, rows, kv heads, n, head_dim]."""
        s = self.spec
        heads = _linear(x, layer.qkv).view(self.rows, -1, s.heads + 2 * s.kv_heads, s.head_dim)
        if angles is not None:
            _rotate(heads[:, :, : s.heads + s.kv_heads], *angles)
        return heads[:, :, : s.heads].transpose(1, 2), self._pair(heads[:, :, s.heads :])

    def _pair(self, made: Tensor) -> Tensor:
        """The keys and values in a product, whose features are theirs, as `_project` has them."""
        pair = made.view(self.rows, -1, 2, self.spec.kv_heads, self.spec.head_dim)
        return pair.permute(2, 0, 3, 1, 4)

    def _feed_forward(self, layer: Layer, x: Tensor, normed: Tensor | None = None) -> None:
        h = self._normed(x, layer.norm2) if normed is None else normed
        h = _linear(h, layer.up)
        if self.spec.gated:
            gate, up = h.chunk(2, dim=-1)
            h = self.activate(gate) * up
        else:
            h = self.activate(h)
        _add(x, h, layer.down)

    def _normed(self, x: Tensor, norm: Norm | None) -> Tensor:
        if norm is None:
            return x
        shape, eps = norm.weight.shape, self.spec.norm_eps
        if norm.bias is None:
            return F.rms_norm(x, shape, norm.weight, eps)
        return F.layer_norm(x, shape, norm.weight, norm.bias, eps)


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _linear(x: Tensor, linear: Linear) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _add(residual: Tensor, x: Tensor, linear: Linear) -> None:
    """residual += linear(x), the sum in the product's own kernel."""
    residual.addmm_(x, linear.weight.t())
    if linear.bias is not None:
        residual.add_(linear.bias)


def _joined(attended: Tensor) -> Tensor:
    """[rows, heads, n, head_dim] as [rows * n, heads * head_dim]."""
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first features of x [rows, n, heads, head_dim] in place, feature i with i + dim /
    2: pairs that other checkpoints interleave are halves in these weights."""
    pairs = cos.shape[-1]
    halves = x[..., : 2 * pairs].view(*x.shape[:-1], 2, pairs)
    torch.addcmul(halves * cos, halves.flip(-2), sin, out=halves)


def _angles(spec: ModelSpec, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """What `_rotate` multiplies halves and swapped halves with, float32: [positions, 1, 1, dim / 2]
    and [positions, 1, 2, dim / 2]."""
    if not isinstance(spec.position, Rope):
        return None
    cos, sin = cos_sin(spec.position, positions, positions)
    return cos[:, None, None], torch.stack((-sin, sin), dim=1)[:, None]


def _bias(spec: ModelSpec, stack: Stack, positions: Tensor, causal: bool) -> Tensor:
    """What all layers add to their scores: float32 [1, heads or 1, queries, keys], with `causal`
    -inf where a key must not be seen."""
    distance = positions[None] - positions[:, None]
    total = torch.zeros((1, 1, *distance.shape), device=distance.device)
    table = stack.layers[0].position_bias
    if isinstance(spec.position, RelativeBias) and table is not None:
        buckets = relative_buckets(distance, spec.position, bidirectional=not causal)
        total = table.float()[buckets].permute(2, 0, 1)[None]
    return total.masked_fill(distance > 0, -torch.inf) if causal else total


def _check(task: Task) -> None:
    if lack := lacking(task.spec, DTYPES[task.dtype]):
        raise SystemExit(f"{task.shape}: --peer torch does not have {lack}")


def _answers(task: Task) -> Iterator[tuple[int, Answer]]:
    """Over the weights that ours has, made anew: ours may have changed the order of its own."""
    spec, tensors = random_model(SHAPES[task.shape], task.dtype, None, task.device)
    weights = bind(spec, tensors)
    for rows in task.batches:
        capture = task.device.type == "cuda"
        graphed = Graphed(spec, weights, rows, task.prompt, task.tokens, capture)
        yield rows, partial(graphed.answer, task.prompts(rows))


GRAPHED = Peer("torch, graphed", _check, _answers)
