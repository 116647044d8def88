"""Rotary position angles, with the stretchings that long-context checkpoints use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmi_multi.models.spec import Rope, RopeScaling


def cos_sin(rope: Rope, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles, float32 [tokens, dim / 2] each.

    `positions` and `lengths` are int64 [tokens]; `lengths` is the context that the token's row
    has reached, which only the `dynamic` scaling reads.
    """
    frequencies = inverse_frequencies(rope, lengths)
    angles = positions[:, None].float() * frequencies
    factor = rope.scaling.attention_factor if rope.scaling else 1.0
    return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(rope: Rope, lengths: Tensor) -> Tensor:
    """Angle per position of each rotary pair: float32 [dim / 2], or [tokens, dim / 2] if dynamic.

    The formulas follow transformers' modeling_rope_utils, the reference for these checkpoints.
    """
    device = lengths.device
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim
    scaling = rope.scaling
    if scaling is not None and scaling.type == "dynamic":
        return _dynamic(rope, scaling, exponents, lengths)
    plain = 1.0 / rope.theta**exponents
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    return _yarn(rope, scaling, plain) if scaling.type == "yarn" else _llama3(scaling, plain)


def _dynamic(rope: Rope, scaling: RopeScaling, exponents: Tensor, lengths: Tensor) -> Tensor:
    """NTK-aware: the base grows with the row's length once that leaves the trained context."""
    length = lengths.clamp(min=scaling.original_max).double()
    stretch = scaling.factor * length / scaling.original_max - (scaling.factor - 1)
    base = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    return 1.0 / base.float()[:, None] ** exponents


def _llama3(scaling: RopeScaling, plain: Tensor) -> Tensor:
    """Llama 3.1: low frequencies are divided by the factor, high ones kept, between: a blend."""
    wavelength = 2 * math.pi / plain
    # As tensors: compared with a number, a tracer of XLA would widen both sides to float64.
    low = torch.full_like(plain, scaling.original_max / scaling.low_freq_factor)
    high = torch.full_like(plain, scaling.original_max / scaling.high_freq_factor)
    blend = (scaling.original_max / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = (1 - blend) * plain / scaling.factor + blend * plain
    stretched = torch.where(wavelength > low, plain / scaling.factor, plain)
    medium = (wavelength >= high) & (wavelength <= low)
    return torch.where(medium, smooth, stretched)


def _yarn(rope: Rope, scaling: RopeScaling, plain: Tensor) -> Tensor:
    """YaRN (Peng et al., 2023): interpolate slow pairs, keep fast ones, ramp between."""

    def pair_turning(rotations: float) -> float:
        turns = scaling.original_max / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32, device=plain.device)
    ramp = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * pairs features of x [tokens, heads, head_dim] in half-split layout.

    `cos` and `sin` are float32 [tokens, pairs]; the product is taken in float32.
    """
    pairs = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :pairs].float(), x[..., pairs : 2 * pairs].float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    if 2 * pairs == x.shape[-1]:
        return torch.cat(turned, dim=-1).to(x.dtype)
    return torch.cat((*(part.to(x.dtype) for part in turned), x[..., 2 * pairs :]), dim=-1)
