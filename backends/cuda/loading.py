"""Weights from a file straight to the GPU: no full copy of them in host memory."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, cast

import torch
from torch import Tensor

from lmi_multi import progress
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.header import TensorInfo, read_header
from lmi_multi.checkpoint.layout import Stored
from lmi_multi.checkpoint.shard import pieces
from lmi_multi.errors import CheckpointError

from . import kernels

THREADS = 16
CHUNK = 32 * 2**20  # bytes that a thread brings at a time
# Of a thread's pinned memory, bytes: one is sent as one is read.
PIECES, PIECE = 2, 2 * 2**20
TOO_SHORT = -1


@dataclass(frozen=True)
class Span:
    """Rows of a file, and where they go: `target` uint8 [rows, bytes]. The first row's bytes begin
    at `start`, and each further row's `pitch` bytes after those of the one before."""

    path: Path
    start: int
    pitch: int
    target: Tensor

    @classmethod
    def of(cls, path: Path, start: int, tensor: Tensor) -> Span:
        """A contiguous tensor that is stored whole."""
        flat = tensor.view(1, -1).view(torch.uint8)
        return cls(path, start, flat.shape[1], flat)

    def chunks(self) -> Iterator[Span]:
        """The same in spans of at most `CHUNK` bytes, or of one row."""
        rows, width = self.target.shape
        if not rows * width:
            return
        if rows == 1:
            for at in range(0, width, CHUNK):
                target = self.target[:, at : at + CHUNK]
                yield Span(self.path, self.start + at, self.pitch, target)
            return
        step = max(1, CHUNK // width)
        for row in range(0, rows, step):
            target = self.target[row : row + step]
            yield Span(self.path, self.start + row * self.pitch, self.pitch, target)


def load_rank(
    artifact: Artifact,
    rank: int,
    size: int,
    device: torch.device,
    names: Container[str] | None = None,
) -> dict[str, Tensor]:
    """`Artifact.load_rank` on `device`, for any degree; raises its errors."""
    artifact.check_rank(rank, size)
    tensors: dict[str, Tensor] = {}

    def made() -> Iterator[tuple[Stored, Tensor]]:
        for t in artifact.wanted(names):
            shape = t.local_shape(size)
            tensors[t.name] = torch.empty(shape, dtype=t.dtype, device=device)
            yield t, tensors[t.name]

    try:
        read_spans(plan_spans(artifact, rank, size, made()), device)
    except OSError as error:
        raise CheckpointError(f"{artifact.folder} changed while it was read: {error}") from None
    return tensors


def plan_spans(
    artifact: Artifact, rank: int, size: int, tensors: Iterable[tuple[Stored, Tensor]]
) -> Iterator[Span]:
    """Where in the artifact's files `tensors`, of those of `rank` of `size`, lie, whatever degree
    the files have. What lies beyond the vocabulary is set to zero here."""
    stored = artifact.tensor_parallel
    paths = [artifact.rank_path(owner) for owner in range(stored)]
    headers = [read_header(path) for path in paths]
    for entry, target in tensors:
        split, name = entry.split, entry.name
        if split is None or size == stored:
            owner = rank if size == stored else 0
            yield Span.of(paths[owner], headers[owner][name].start, target)
            continue
        at = 0
        for part in pieces(split, entry.shape[split.dim], stored, size, rank):
            own = target.narrow(split.dim, at, part.size)
            at += part.size
            if part.rank is None:
                own.zero_()
            else:
                info = headers[part.rank][name]
                yield _part(paths[part.rank], info, split.dim, part.start, own)


def _part(path: Path, info: TensorInfo, dim: int, first: int, target: Tensor) -> Span:
    """Rows (`dim` 0) or columns (1) of a stored tensor, from its `first` on."""
    item = info.dtype.itemsize
    row = item * math.prod(info.shape[1:])
    if dim == 0:
        return Span.of(path, info.start + first * row, target)
    return Span(path, info.start + first * item, row, target.view(torch.uint8))


def read_file(path: Path, infos: dict[str, TensorInfo], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file on a GPU. Raises OSError, and CheckpointError if it became
    shorter."""
    tensors = {
        name: torch.empty(info.shape, dtype=info.dtype, device=device)
        for name, info in infos.items()
    }
    read_spans((Span.of(path, info.start, tensors[name]) for name, info in infos.items()), device)
    return tensors


def read_spans(spans: Iterable[Span], device: torch.device) -> None:
    """Fill the targets, on a GPU; the first ones while later ones are made. Raises OSError, and
    CheckpointError if a file became shorter."""
    queue: SimpleQueue[Span | None] = SimpleQueue()
    stop = Event()
    made = torch.cuda.Event()  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)
    with ThreadPoolExecutor(THREADS) as pool:
        sending: list[Future[None]] = []
        try:
            try:
                for _ in range(THREADS):
                    sending.append(pool.submit(_send, queue, device, made, stop))
                for span in spans:
                    made.record(stream)  # what had this tensor's memory before may still be used
                    for chunk in span.chunks():
                        queue.put(chunk)
                    if stop.is_set():
                        break
            finally:
                for _ in range(THREADS):
                    queue.put(None)
            for done in sending:
                done.result()
        except BaseException:  # Ctrl-C as well: nobody need bring the rest
            stop.set()
            raise


def _send(
    queue: SimpleQueue[Span | None], device: torch.device, made: torch.cuda.Event, stop: Event
) -> None:
    """Bring chunks until there is None instead; or none any more, once any thread has failed."""
    files: dict[Path, FileIO] = {}
    try:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pinned = torch.empty((PIECES, PIECE), dtype=torch.uint8, pin_memory=True)
        with ExitStack() as opened, torch.cuda.stream(stream):
            while (chunk := queue.get()) is not None:
                if stop.is_set():
                    continue
                progress.tick()
                if chunk.path not in files:
                    files[chunk.path] = opened.enter_context(chunk.path.open("rb", buffering=0))
                stream.wait_event(made)
                bring(files[chunk.path], chunk, pinned)
    except BaseException:
        stop.set()
        raise


def bring(file: FileIO, span: Span, pinned: Tensor) -> None:
    """Fill the target through `pinned` uint8 [pieces, bytes]; it is there on return. Raises
    OSError, and CheckpointError if the file became shorter."""
    read = read_rows if kernels.missing() else torch.ops.lmi_multi.read_rows
    fault = read(file.fileno(), span.start, span.pitch, span.target, pinned)
    if fault == TOO_SHORT:
        raise CheckpointError(f"{file.name} became shorter while it was read")
    if fault:
        raise OSError(fault, os.strerror(fault), file.name)


def read_rows(file: int, start: int, pitch: int, target: Tensor, pinned: Tensor) -> int:
    """What the kernels' operator of this name does (csrc/library_read.cu), where there are none;
    but nothing is sent while something is read."""
    buffer = pinned.view(-1)
    view = memoryview(cast(Any, buffer.numpy()))
    rows, width = target.shape
    part, most = min(width, len(buffer)), max(len(buffer) // width, 1)
    for row in range(0, rows, most):
        count = min(most, rows - row)
        for at in range(0, width, part):
            size = min(part, width - at)
            for i in range(count):
                own = view[i * size : (i + 1) * size]
                if not _fill(file, own, start + (row + i) * pitch + at):
                    return TOO_SHORT
            there = buffer[: count * size].view(count, size)
            target[row : row + count, at : at + size].copy_(there)
    return 0


def _fill(file: int, view: memoryview, start: int) -> bool:
    """Read from `start` on until `view` is full; False if the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], start + done)
        if not count:
            return False
        done += count
    return True
