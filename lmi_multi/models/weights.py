"""One rank's canonical tensors, bound to the structure that the network computes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lmi_multi.models.bias import alibi_slopes
from lmi_multi.models.schema import Split
from lmi_multi.models.spec import Alibi, ModelSpec, RelativeBias
from lmi_multi.models.stages import Stage

# What differs between ranks beside the weights, for backends that trace one program for all.
FIRST_ID = "rank.first_id"
SLOPES = "rank.slopes"
# The types of quantized weights, and the largest code of each. int8's -128 stays unused, so that
# signs are alike.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def rank_data(spec: ModelSpec, rank: int, size: int) -> dict[str, Tensor]:
    """The rank's own numbers as tensors that `bind` takes beside the weights: its first id of the
    vocabulary int64 [1] and, with ALiBi, its heads' slopes float32 [heads]."""
    [(first, _)] = Split(0, (spec.vocab,), padded=True).ranges(size, rank)
    data = {FIRST_ID: torch.tensor([first])}
    if isinstance(spec.position, Alibi):
        [(start, stop)] = Split(0, (spec.heads,)).ranges(size, rank)
        data[SLOPES] = alibi_slopes(spec.heads)[start:stop]
    return data


@dataclass(frozen=True)
class Linear:
    """weight [out, in], bias [out] or None. The weight is of a float type, or it is codes in int8
    or float8_e4m3fn with a float32 scale [out]: row o is then weight[o] * scale[o]."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """LayerNorm (with bias) or RMSNorm (without); weight and bias are [features]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of a stack. `index` counts the layers of the stack that the rank holds: it is where
    the cache keeps this one's keys and values. `position_bias` is the relative-bias table [buckets,
    heads], or the ALiBi slopes [heads]; heads are this rank's. `window` and `scale` belong to its
    attention."""

    index: int
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    norm1: Norm
    norm2: Norm
    scale: float
    window: int = 0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    cross_norm: Norm | None = None
    cross_q: Linear | None = None
    cross_kv: Linear | None = None
    cross_out: Linear | None = None
    position_bias: Tensor | None = None


@dataclass(frozen=True)
class Stack:
    """An encoder or a decoder, or a stage's part of one: its layers, and the norm after them if
    there is one."""

    layers: tuple[Layer, ...]
    norm: Norm | None


@dataclass(frozen=True)
class Weights:
    """Everything one rank holds. A tied head shares the tensor of `embed`. A pipeline's stage has
    `embed` if it is the first, `head` if it is the last.

    `first_id` int64 [1] is the first id in the rank's share of `embed`, where that must be data:
    one traced program that serves every rank. None: it follows from the rank's number.
    """

    embed: Tensor | None
    head: Linear | None
    positions: Tensor | None
    segments: Tensor | None
    embed_norm: Norm | None
    project_in: Linear | None
    project_out: Linear | None
    pooler: Linear | None
    encoder: Stack | None
    decoder: Stack | None
    first_id: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations."""
        return self._typical.dtype

    @property
    def device(self) -> torch.device:
        """Where it all lies."""
        return self._typical.device

    @property
    def _typical(self) -> Tensor:
        """A tensor of the common type, which every stage has."""
        stack = self.decoder or self.encoder
        if self.embed is not None or stack is None:
            return cast(Tensor, self.embed)
        return stack.layers[0].norm1.weight


class _Binder:
    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor], rank: int, size: int):
        self.spec, self.tensors, self.rank, self.size = spec, tensors, rank, size

    def linear(self, name: str) -> Linear | None:
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return None
        get = self.tensors.get
        return Linear(weight, get(f"{name}.bias"), get(f"{name}.scale"))

    def need(self, name: str) -> Linear:
        linear = self.linear(name)
        if linear is None:
            raise KeyError(f"{name}.weight")
        return linear

    def norm(self, name: str) -> Norm | None:
        weight = self.tensors.get(f"{name}.weight")
        return None if weight is None else Norm(weight, self.tensors.get(f"{name}.bias"))

    def position_bias(self, stack: str, index: int) -> Tensor | None:
        position = self.spec.position
        if isinstance(position, RelativeBias):
            own = index if position.per_layer else 0
            return self.tensors[f"{stack}.{own}.relative.weight"]
        if isinstance(position, Alibi):
            if SLOPES in self.tensors:
                return self.tensors[SLOPES]
            heads = Split(0, (self.spec.heads,))
            [(start, stop)] = heads.ranges(self.size, self.rank)
            slopes = alibi_slopes(self.spec.heads)[start:stop]
            return slopes.to(self.tensors[f"{stack}.{index}.qkv.weight"].device)
        return None

    def layer(self, stack: str, index: int, place: int) -> Layer:
        name = f"{stack}.{index}."
        decoder = stack == "decoder"
        norm1 = self.norm(name + "norm1")
        if norm1 is None:
            raise KeyError(f"{name}norm1.weight")
        return Layer(
            index=place,
            qkv=self.need(name + "qkv"),
            out=self.need(name + "out"),
            up=self.need(name + "up"),
            down=self.need(name + "down"),
            norm1=norm1,
            # GPT-J's one norm feeds attention and FFN alike.
            norm2=self.norm(name + "norm2") or norm1,
            scale=self.spec.scale(index) if decoder else self.spec.attention_scale,
            window=self.spec.window(index) if decoder else 0,
            q_norm=self.norm(name + "q_norm"),
            k_norm=self.norm(name + "k_norm"),
            cross_norm=self.norm(name + "cross_norm"),
            cross_q=self.linear(name + "cross_q"),
            cross_kv=self.linear(name + "cross_kv"),
            cross_out=self.linear(name + "cross_out"),
            position_bias=self.position_bias(stack, index),
        )

    def stack(self, stack: str, held: range) -> Stack | None:
        if not held:
            return None
        layers = tuple(self.layer(stack, i, place) for place, i in enumerate(held))
        return Stack(layers, self.norm(f"{stack}.norm"))


def bind(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    rank: int = 0,
    size: int = 1,
    stage: Stage | None = None,
) -> Weights:
    """Arrange one rank's canonical tensors: those of its pipeline `stage`; None is the whole
    network. Raises KeyError with the name of a missing one."""
    b = _Binder(spec, tensors, rank, size)
    held = stage or Stage(0, 1, range(spec.encoder_layers), range(spec.decoder_layers))
    head = b.linear("head") if held.last else None
    embed = tensors["embed.weight"] if held.first or (held.last and head is None) else None
    if held.last and head is None and embed is not None:
        head = Linear(embed)
    positions, segments = tensors.get("positions.weight"), tensors.get("segments.weight")
    return Weights(
        embed=embed,
        head=head,
        positions=positions,
        segments=segments,
        embed_norm=b.norm("embed_norm"),
        project_in=b.linear("project_in"),
        project_out=b.linear("project_out"),
        pooler=b.linear("pooler"),
        encoder=b.stack("encoder", held.encoder),
        decoder=b.stack("decoder", held.decoder),
        first_id=tensors.get(FIRST_ID),
    )
