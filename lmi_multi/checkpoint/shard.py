"""Tensor-parallel slices: from a whole tensor to a rank's part, and from one degree to another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmi_multi.models.schema import Split


@dataclass(frozen=True)
class Piece:
    """`size` elements along the split dimension: from `start` of stored rank `rank`, or zeros."""

    rank: int | None
    start: int
    size: int


def local_slice(whole: Tensor, split: Split | None, degree: int, rank: int) -> Tensor:
    """The part of `whole` that `rank` of `degree` holds; beyond the dimension it is zeros."""
    if split is None:
        return whole
    size = whole.shape[split.dim]
    parts = []
    for start, stop in split.ranges(degree, rank):
        inside = whole.narrow(split.dim, min(start, size), max(0, min(stop, size) - start))
        parts.append(inside)
        if stop > size:
            shape = list(whole.shape)
            shape[split.dim] = stop - max(start, size)
            parts.append(whole.new_zeros(shape))
    return parts[0] if len(parts) == 1 else torch.cat(parts, split.dim)


def local_chunks(
    whole: Tensor, split: Split | None, degree: int, rank: int, limit: int
) -> Iterator[Tensor]:
    """`local_slice` in chunks of whole rows, each of at most `limit` elements (or one row)."""
    rows = whole.shape[0]
    step = max(1, limit * rows // max(whole.numel(), 1))
    if split is not None and split.dim != 0:
        for start in range(0, rows, step):
            yield local_slice(whole[start : start + step], split, degree, rank)
        return
    for first, last in [(0, rows)] if split is None else split.ranges(degree, rank):
        for start in range(first, last, step):
            stop = min(start + step, last)
            inside = whole[min(start, rows) : min(stop, rows)]
            if inside.shape[0]:
                yield inside
            if stop > rows:
                yield whole.new_zeros((stop - max(start, rows), *whole.shape[1:]))


def pieces(split: Split, size: int, stored: int, degree: int, rank: int) -> list[Piece]:
    """Where `rank` of `degree` finds its part in files stored at degree `stored`.

    `size` is the length of the split dimension. The pieces, in order, make up the rank's part.
    """
    result = []
    spans = [_spans(split, size, stored, owner) for owner in range(stored)]
    for start, stop in split.ranges(degree, rank):
        at = start
        while at < min(stop, size):
            owner, offset, end = _find(spans, at)
            end = min(end, stop)
            result.append(Piece(owner, offset, end - at))
            at = end
        if at < stop:
            result.append(Piece(None, 0, stop - at))
    return result


def _spans(split: Split, size: int, degree: int, rank: int) -> list[tuple[int, int, int]]:
    """(global start, global stop, local start) of what a rank holds, padding left out."""
    spans, local = [], 0
    for start, stop in split.ranges(degree, rank):
        spans.append((start, min(stop, size), local))
        local += stop - start
    return spans


def _find(spans: list[list[tuple[int, int, int]]], at: int) -> tuple[int, int, int]:
    """(rank, local offset, global end) of a stored span that holds global element `at`."""
    for owner, held in enumerate(spans):
        for start, stop, local in held:
            if start <= at < stop:
                return owner, local + at - start, stop
    raise IndexError(f"no stored rank holds element {at}")
