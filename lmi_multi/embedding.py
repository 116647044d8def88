"""One vector a text from a network's last hidden states."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lmi_multi.errors import OptionError

Pooling = Literal["mean", "cls", "last"]


def check_pooling(pooling: str) -> None:
    """Raise OptionError unless `pooling` is known."""
    if pooling not in get_args(Pooling):
        raise OptionError(f"pooling is {pooling!r}, must be {', '.join(get_args(Pooling))}")


def pool(hidden: Tensor, pooling: Pooling, normalize: bool) -> npt.NDArray[np.float32]:
    """hidden float32 [tokens, hidden] of one text -> float32 [hidden].

    "mean" averages all tokens, special ones included, "cls" takes the first token and "last" the
    last, as sentence-transformers' Pooling does; `normalize` divides by the Euclidean norm.
    """
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    if normalize:
        vector = vector / vector.norm().clamp(min=1e-12)
    result: npt.NDArray[np.float32] = vector.numpy()
    return result
