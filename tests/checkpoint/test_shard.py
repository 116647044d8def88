"""Splits: every element has its place, and any degree can be built from any other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmi_multi.checkpoint.shard import local_chunks, local_slice, pieces
from lmi_multi.models.schema import Split

DEGREES = (1, 2, 3, 4, 6, 8)


@st.composite
def splits(draw: st.DrawFn) -> tuple[Split, int, int, int]:
    """A split with two degrees that it allows, and the length of its dimension."""
    one, other = draw(st.sampled_from(DEGREES)), draw(st.sampled_from(DEGREES))
    dim = draw(st.sampled_from((0, 1)))
    if dim == 0 and draw(st.booleans()):
        units = draw(st.integers(1, 40))
        return Split(0, (units,), padded=True), units, one, other
    unit = draw(st.integers(1, 3))
    both = one * other
    whole = draw(st.integers(1, 2)) * both
    # kv heads: fewer than the ranks, each of which holds one
    few = draw(st.sampled_from([n for n in range(1, both + 1) if both % n == 0]))
    few = few if all(few % d == 0 or d % few == 0 for d in (one, other)) else both
    parts = draw(st.sampled_from([(whole,), (whole, whole), (whole, few, few), (few,)]))
    return Split(dim, parts, unit), sum(parts) * unit, one, other


def example(split: Split, size: int) -> torch.Tensor:
    shape = (size, 2) if split.dim == 0 else (2, size)
    return torch.arange(1, 1 + 2 * size).reshape(shape)


@settings(max_examples=300, deadline=None)
@given(splits())
def test_pieces_build_any_degree_from_any_other(case: tuple[Split, int, int, int]) -> None:
    split, size, stored, degree = case
    whole = example(split, size)
    files = [local_slice(whole, split, stored, rank) for rank in range(stored)]
    for rank in range(degree):
        expected = local_slice(whole, split, degree, rank)
        parts = []
        for piece in pieces(split, size, stored, degree, rank):
            if piece.rank is None:
                shape = list(whole.shape)
                shape[split.dim] = piece.size
                parts.append(whole.new_zeros(shape))
            else:
                parts.append(files[piece.rank].narrow(split.dim, piece.start, piece.size))
        assert torch.equal(torch.cat(parts, split.dim), expected)
        assert expected.shape[split.dim] == split.size(degree)


@settings(max_examples=200, deadline=None)
@given(splits())
def test_ranks_cover_every_element(case: tuple[Split, int, int, int]) -> None:
    split, size, degree, _ = case
    whole = example(split, size)
    held = torch.cat([local_slice(whole, split, degree, r).reshape(-1) for r in range(degree)])
    assert set(whole.reshape(-1).tolist()) == set(held.tolist()) - {0}
    if min(split.parts) >= degree and not split.padded:
        assert held.numel() == whole.numel()


@settings(max_examples=200, deadline=None)
@given(splits(), st.integers(1, 50))
def test_chunks_make_up_the_slice(case: tuple[Split, int, int, int], limit: int) -> None:
    split, size, degree, _ = case
    whole = example(split, size)
    for rank in range(degree):
        chunks = list(local_chunks(whole, split, degree, rank, limit))
        assert torch.equal(torch.cat(chunks), local_slice(whole, split, degree, rank))
        assert all(c.shape[0] == 1 or c.numel() <= max(limit, c[0].numel()) for c in chunks)


def test_chunks_of_what_is_not_split() -> None:
    whole = torch.arange(30).reshape(10, 3)
    chunks = list(local_chunks(whole, None, 4, 2, 7))
    assert [len(chunk) for chunk in chunks] == [2] * 5
    assert torch.equal(torch.cat(chunks), whole)
