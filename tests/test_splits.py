"""How tensors are split over ranks: whole and in order, at every degree that is valid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmi_multi.errors import OptionError
from lmi_multi.models.schema import Split, check_degree, schema, valid_degrees
from lmi_multi.models.spec import Learned, ModelSpec


@given(
    parts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    unit=st.integers(1, 5),
    degree=st.integers(1, 12),
    padded=st.booleans(),
)
def test_splits_cover_everything_in_order(
    parts: list[int], unit: int, degree: int, padded: bool
) -> None:
    """Every rank has the same size, and part by part the ranks make up the whole."""
    if padded:
        parts, unit = parts[:1], 1
    elif any(n % degree and degree % n for n in parts):
        return
    split = Split(0, tuple(parts), unit, padded)
    ranges = [split.ranges(degree, rank) for rank in range(degree)]
    assert all(sum(b - a for a, b in own) == split.size(degree) for own in ranges)
    base = 0
    for part, units in enumerate(parts):
        held = [own[part] for own in ranges]
        assert held == sorted(held) and all((b - a) % unit == 0 for a, b in held)
        elements = [e for a, b in dict.fromkeys(held) for e in range(a, b)]
        if padded:
            assert elements[:units] == list(range(units)) and len(elements) < units + degree
        else:
            assert elements == list(range(base, base + units * unit))
            copies = [held.count(own) for own in held]
            assert set(copies) == {max(1, degree // units)}
        base += units * unit


@given(kv=st.integers(1, 4), group=st.integers(1, 4), ffn=st.integers(1, 48), gated=st.booleans())
def test_valid_degrees_split_every_tensor(kv: int, group: int, ffn: int, gated: bool) -> None:
    spec = ModelSpec(
        family="x",
        vocab=11,
        hidden=24,
        heads=kv * group,
        kv_heads=kv,
        head_dim=2,
        ffn=ffn,
        gated=gated,
        decoder_layers=1,
        position=Learned(),
    )
    degrees = valid_degrees(spec)
    assert 1 in degrees
    for degree in degrees:
        check_degree(spec, degree)
        for name in ("decoder.0.qkv", "decoder.0.out", "decoder.0.up", "decoder.0.down"):
            whole, local = schema(spec, name).shape, schema(spec, name).local_shape(degree)
            assert all(0 < n <= m for n, m in zip(local, whole, strict=True))
        heads = Split(0, (spec.heads,))
        keys = Split(0, (spec.kv_heads,))
        for rank in range(degree):  # a rank's queries find their keys on the same rank
            [(first, last)], [(low, high)] = heads.ranges(degree, rank), keys.ranges(degree, rank)
            assert {q // group for q in range(first, last)} == set(range(low, high))
    with pytest.raises(OptionError, match=f"can be split over {', '.join(map(str, degrees))}$"):
        check_degree(spec, 1009)
