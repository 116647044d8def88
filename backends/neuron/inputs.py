"""A step's host data as inputs of static shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(values: Sequence[int], count: int, filler: int) -> Tensor:
    """int64 [count]: the values and then `filler`."""
    return torch.tensor([*values, *[filler] * (count - len(values))], dtype=torch.int64)


def slots(blocks: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """Where tokens start to stop of a sequence lie: block * block_size + offset."""
    return [blocks[t // block_size] * block_size + t % block_size for t in range(start, stop)]


def block_table(rows: Sequence[Sequence[int]], count: int, width: int, filler: int) -> Tensor:
    """int64 [count, width]: every row's first `width` blocks; `filler` where there are none."""
    table = [[*blocks[:width], *[filler] * (width - len(blocks))] for blocks in rows]
    return torch.tensor(table + [[filler] * width] * (count - len(rows)), dtype=torch.int64)
