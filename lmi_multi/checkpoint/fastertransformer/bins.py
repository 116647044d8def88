"""Raw files of one tensor: their names and sizes, and the whole that they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]


def same(whole: Tensor) -> Tensor:
    """Stored as the family's own checkpoints have it."""
    return whole


def transposed(whole: Tensor) -> Tensor:
    """[in, out] as stored -> [out, in]."""
    return whole.t()


def third(index: int) -> View:
    """One of q, k, v out of [in, 3, out], as [out, in]."""
    return lambda whole: whole[:, index].t()


@dataclass(frozen=True)
class Bins:
    """`stem`.bin, or one `stem`.RANK.bin for each GPU when they share dimension `axis`.

    `shape` is the whole tensor's as stored, row-major; `view` turns it into what the family's own
    checkpoints hold, and works on meta tensors too.
    """

    stem: str
    shape: tuple[int, ...]
    axis: int | None = None
    view: View = same
    divided: bool = False

    def names(self, gpus: int) -> list[str]:
        """The files of a layout for so many GPUs."""
        if self.axis is None:
            return [f"{self.stem}.bin"]
        return [f"{self.stem}.{rank}.bin" for rank in range(gpus)]

    def file_shape(self, gpus: int) -> tuple[int, ...]:
        """The shape in each of the files."""
        shape = list(self.shape)
        if self.axis is not None:
            shape[self.axis] //= gpus
        return tuple(shape)

    def file_bytes(self, gpus: int, dtype: torch.dtype) -> int:
        """The size of each of the files."""
        return math.prod(self.file_shape(gpus)) * dtype.itemsize

    def result_shape(self) -> tuple[int, ...]:
        """The shape that `view` gives."""
        return tuple(self.view(torch.empty(self.shape, device="meta")).shape)


Table = dict[str, Bins]


@dataclass(frozen=True)
class Layout:
    """One model: its config.json, its tensors by their source names, and how they are stored.

    `gpus` is the number of GPUs that the settings tell, if they do. `optional` tensors may have no
    file; `ignored` are shell-style patterns of files that nothing needs.
    """

    config: dict[str, Any]
    tensors: Table
    dtype: torch.dtype
    gpus: int | None = None
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
