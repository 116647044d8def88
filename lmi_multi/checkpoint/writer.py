"""Writes one safetensors file tensor by tensor, hashing on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lmi_multi.checkpoint.header import build_header
from lmi_multi.checkpoint.layout import Stored


class Progress(Protocol):
    """Called as bytes are written: how many of how many, and the tensor's canonical name."""

    def __call__(self, done_bytes: int, total_bytes: int, name: str) -> None: ...


class RankFile:
    """A safetensors file whose tensors are known before their data.

    Writing them in the file's own order lets the sha256 grow with the file; after any other order
    the file is read once more. `size` is the final size in bytes.
    """

    def __init__(self, path: Path, tensors: list[Stored], degree: int) -> None:
        self.path = path
        layout = [(t.name, t.local_shape(degree), t.dtype) for t in tensors]
        header, self._infos = build_header(layout)
        self.size = max((info.stop for info in self._infos.values()), default=len(header))
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._file = path.open("wb")
        self._put(0, memoryview(header))

    def _put(self, offset: int, data: memoryview) -> None:
        self._file.seek(offset)
        self._file.write(data)
        if offset == self._hashed:
            self._hash.update(data)
            self._hashed += len(data)

    def write(self, name: str, chunks: Iterable[Tensor]) -> Iterable[int]:
        """Write the tensor `name` from its rows in `chunks`; yields the bytes of each."""
        info = self._infos[name]
        offset = info.start
        for chunk in chunks:
            data = chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data
            self._put(offset, data)
            offset += len(data)
            yield len(data)
        if offset != info.stop:
            raise RuntimeError(f"{name}: {offset - info.start} bytes, not {info.nbytes}")

    def finish(self) -> str:
        """Flush to the disk and close; returns the sha256 in hexadecimal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest() if self._hashed == self.size else sha256(self.path)

    def close(self) -> None:
        """Close after a failure; what was written is worth nothing."""
        try:
            self._file.close()
        except OSError:  # the buffer's rest may meet the same full disk
            return


def sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
