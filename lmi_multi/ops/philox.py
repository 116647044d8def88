"""Random numbers that are a pure function of (seed, step): Philox4x32-10.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and its
library Random123. There is no state: any draw can be computed anywhere, in any order, so a
prompt's tokens do not depend on the batch it runs in, and a kernel can repeat the draws bitwise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)  # golden ratio, sqrt(3) - 1

Words = npt.NDArray[np.uint64]


def philox4x32(counter: Words, key: Words, rounds: int = ROUNDS) -> Words:
    """The four output words of Philox4x32.

    `counter` is uint64[4, n] and `key` uint64[2, n], each entry a 32-bit word; returns
    uint64[4, n], each below 2**32.
    """
    # Words 0 and 2 at once, and 1 and 3: what takes time here is the number of numpy's calls.
    even, odd = counter[::2], counter[1::2]
    for _ in range(rounds):
        # A product of two 32-bit words fits 64 bits: its halves are the "mulhi" and "mullo".
        products = (_MULTIPLIERS * even)[::-1]
        even = (products >> _HALF) ^ odd ^ key
        odd = products & _LOW
        key = (key + _WEYL) & _LOW
    return np.stack((even, odd), axis=1).reshape(counter.shape)


def uniform(
    seeds: npt.ArrayLike, steps: npt.ArrayLike, stream: npt.ArrayLike = 0
) -> npt.NDArray[np.float32]:
    """One number in [0, 1) for every (seed, step): float32[n], multiples of 2**-24.

    The key is the 64-bit seed, low word first; the counter is (step's low word, its high word,
    `stream`, 0); the number is the top 24 bits of the first output word. `seeds` and `steps` are
    integers in [0, 2**64), of one shape [n]; `stream` in [0, 2**32), one for all or [n], keeps
    draws apart that share seed and step.
    """
    seed, step = np.asarray(seeds, dtype=np.uint64), np.asarray(steps, dtype=np.uint64)
    zero = np.zeros_like(step)
    counter = np.stack(
        (step & _LOW, step >> _HALF, zero + np.asarray(stream, dtype=np.uint64), zero)
    )
    word = philox4x32(counter, np.stack((seed & _LOW, seed >> _HALF)))[0]
    top = (word >> np.uint64(8)).astype(np.float32)
    fraction: npt.NDArray[np.float32] = top * np.float32(2.0**-24)
    return fraction
