"""Every canonical tensor of a network: its shape, and how tensor parallelism splits it.

Names are `embed`, `head`, `encoder.3.qkv`, `decoder.0.cross_kv` and so on, each followed by
`.weight` or `.bias`; quantized weights have a `.scale` beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmi_multi.errors import OptionError
from lmi_multi.models.spec import ModelSpec, RelativeBias

NORMS = ("embed_norm", "norm", "norm1", "norm2", "cross_norm", "q_norm", "k_norm")
# Modules whose weights weight-only quantization stores in one byte each.
QUANTIZED = ("qkv", "out", "up", "down", "cross_q", "cross_kv", "cross_out", "head")


@dataclass(frozen=True)
class Split:
    """How dimension `dim` is divided over ranks.

    The dimension is a concatenation of parts; part p holds `parts[p]` units of `unit` elements.
    Every rank takes its share of each part, so that [q; k; v] and [gate; up] stay aligned. A part
    with fewer units than ranks is replicated (kv heads); `padded` parts (the vocabulary) are
    filled up with zero rows to a multiple of the degree.
    """

    dim: int
    parts: tuple[int, ...]
    unit: int = 1
    padded: bool = False

    def ranges(self, degree: int, rank: int) -> list[tuple[int, int]]:
        """The global element ranges [start, stop) that `rank` of `degree` holds, in its order.

        A padded part's range may reach beyond the dimension: what is beyond reads as zeros.
        """
        result, base = [], 0
        for units in self.parts:
            if self.padded:
                share = -(-units // degree)
                first = rank * share
            elif units >= degree:
                share = units // degree
                first = rank * share
            else:
                share, first = 1, rank * units // degree
            start = base + first * self.unit
            result.append((start, start + share * self.unit))
            base += units * self.unit
        return result

    def size(self, degree: int) -> int:
        """Elements of the dimension on each rank."""
        return sum(stop - start for start, stop in self.ranges(degree, 0))


@dataclass(frozen=True)
class TensorSchema:
    """One canonical module's weight: full shape, split of it, and whether quantization applies."""

    shape: tuple[int, ...]
    split: Split | None = None
    quantized: bool = False

    def bias(self) -> TensorSchema:
        """The bias's schema: it follows dim 0 of the weight, and is whole where dim 1 is split."""
        split = self.split if self.split is not None and self.split.dim == 0 else None
        return TensorSchema(self.shape[:1], split)

    def local_shape(self, degree: int) -> tuple[int, ...]:
        """The shape that each of `degree` ranks holds."""
        if self.split is None:
            return self.shape
        shape = list(self.shape)
        shape[self.split.dim] = self.split.size(degree)
        return tuple(shape)


def schema(spec: ModelSpec, module: str) -> TensorSchema:
    """The schema of canonical module `module` (no `.weight`). Raises KeyError if unknown."""
    name = module.rsplit(".", 1)[-1]
    s, d = spec, spec.head_dim
    if name in NORMS:
        width = d if name in ("q_norm", "k_norm") else s.hidden
        return TensorSchema((width,))
    vocab = Split(0, (s.vocab,), padded=True)
    heads_in, heads_out = Split(1, (s.heads,), d), Split(0, (s.heads,), d)
    up = (s.ffn, s.ffn) if s.gated else (s.ffn,)
    table = {
        "embed": TensorSchema((s.vocab, s.embed_dim), vocab),
        "head": TensorSchema((s.vocab, s.embed_dim), vocab, True),
        "positions": TensorSchema((s.max_positions, s.hidden)),
        "segments": TensorSchema((s.segments, s.hidden)),
        "project_in": TensorSchema((s.hidden, s.embed_dim)),
        "project_out": TensorSchema((s.embed_dim, s.hidden)),
        "pooler": TensorSchema((s.hidden, s.hidden)),
        "qkv": TensorSchema(
            ((s.heads + 2 * s.kv_heads) * d, s.hidden),
            Split(0, (s.heads, s.kv_heads, s.kv_heads), d),
            True,
        ),
        "out": TensorSchema((s.hidden, s.heads * d), heads_in, True),
        "cross_q": TensorSchema((s.heads * d, s.hidden), heads_out, True),
        "cross_kv": TensorSchema(
            (2 * s.kv_heads * d, s.hidden), Split(0, (s.kv_heads, s.kv_heads), d), True
        ),
        "cross_out": TensorSchema((s.hidden, s.heads * d), heads_in, True),
        "up": TensorSchema((sum(up), s.hidden), Split(0, up), True),
        "down": TensorSchema((s.hidden, s.ffn), Split(1, (s.ffn,)), True),
    }
    if isinstance(s.position, RelativeBias):
        table["relative"] = TensorSchema((s.position.buckets, s.heads), Split(1, (s.heads,)))
    return table[name]


def valid_degrees(spec: ModelSpec, limit: int = 64) -> list[int]:
    """The tensor-parallel degrees up to `limit` at which this network can be split."""
    return [
        n
        for n in range(1, min(limit, spec.heads) + 1)
        if spec.heads % n == 0
        and spec.ffn % n == 0
        and (spec.kv_heads % n == 0 or n % spec.kv_heads == 0)
    ]


def check_degree(spec: ModelSpec, degree: int) -> None:
    """Raise OptionError that lists the valid degrees unless `degree` is one of them."""
    if degree not in valid_degrees(spec, max(degree, 1)):
        valid = ", ".join(str(n) for n in valid_degrees(spec))
        raise OptionError(
            f"tensor_parallel is {degree}, but heads {spec.heads}, kv_heads {spec.kv_heads} and "
            f"ffn {spec.ffn} can be split over {valid}"
        )
