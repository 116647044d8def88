"""Weights from a file straight to the GPU: no full copy of them in host memory."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, cast

import torch
from torch import Tensor

from lmi_multi import progress
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.header import TensorInfo, read_header
from lmi_multi.checkpoint.shard import pieces
from lmi_multi.errors import CheckpointError

THREADS = 16
CHUNK = 8 * 2**20  # bytes of a pinned buffer, of which each thread fills one while one is sent


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

    def read(self, file: FileIO, view: memoryview) -> None:
        """Fill `view` with the rows. Raises CheckpointError if the file became shorter."""
        rows, width = self.target.shape
        for row in range(rows):
            _fill(file, view[row * width : (row + 1) * width], self.start + row * self.pitch)


def load_rank(
    artifact: Artifact,
    rank: int,
    size: int,
    device: torch.device,
    names: Container[str] | None = None,
) -> dict[str, Tensor]:
    """`Artifact.load_rank` on `device`, for any degree; raises its errors."""
    artifact.check_rank(rank, size)
    tensors = {
        t.name: torch.empty(t.local_shape(size), dtype=t.dtype, device=device)
        for t in artifact.wanted(names)
    }
    try:
        read_spans(plan_spans(artifact, rank, size, tensors), device)
    except OSError as error:
        raise CheckpointError(f"{artifact.folder} changed while it was read: {error}") from None
    return tensors


def plan_spans(
    artifact: Artifact, rank: int, size: int, tensors: Mapping[str, Tensor]
) -> list[Span]:
    """Where in the artifact's files `tensors`, those of `rank` of `size`, lie, whatever degree the
    files have. What lies beyond the vocabulary is set to zero here."""
    stored = artifact.tensor_parallel
    paths = [artifact.rank_path(owner) for owner in range(stored)]
    headers = [read_header(path) for path in paths]
    spans: list[Span] = []
    for entry in artifact.wanted(tensors):
        target, split, name = tensors[entry.name], entry.split, entry.name
        if split is None or size == stored:
            owner = rank if size == stored else 0
            spans.append(Span.of(paths[owner], headers[owner][name].start, target))
            continue
        at = 0
        for part in pieces(split, entry.shape[split.dim], stored, size, rank):
            own = target.narrow(split.dim, at, part.size)
            at += part.size
            if part.rank is None:
                own.zero_()
            else:
                info = headers[part.rank][name]
                spans.append(_part(paths[part.rank], info, split.dim, part.start, own))
    return spans


def _part(path: Path, info: TensorInfo, dim: int, first: int, target: Tensor) -> Span:
    """Rows (`dim` 0) or columns (1) of a stored tensor, from its `first` on."""
    item = info.dtype.itemsize
    row = item * math.prod(info.shape[1:])
    if dim == 0:
        return Span.of(path, info.start + first * row, target)
    return Span(path, info.start + first * item, row, target.view(torch.uint8))


def read_file(path: Path, infos: dict[str, TensorInfo], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file on a GPU. Raises CheckpointError if it became shorter."""
    tensors = {
        name: torch.empty(info.shape, dtype=info.dtype, device=device)
        for name, info in infos.items()
    }
    spans = [Span.of(path, info.start, tensors[name]) for name, info in infos.items()]
    read_spans(spans, device)
    return tensors


def read_spans(spans: Iterable[Span], device: torch.device) -> None:
    """Fill the targets, on a GPU. Raises CheckpointError if a file became shorter."""
    queue: SimpleQueue[Span] = SimpleQueue()
    largest = CHUNK
    for span in spans:
        for chunk in span.chunks():
            queue.put(chunk)
            largest = max(largest, chunk.target.numel())
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record(torch.cuda.current_stream(device))
    with ThreadPoolExecutor(THREADS) as pool:
        send = partial(_send, queue, device, ready, largest)
        for done in [pool.submit(send) for _ in range(THREADS)]:
            done.result()


def _send(
    queue: SimpleQueue[Span], device: torch.device, ready: torch.cuda.Event, largest: int
) -> None:
    """Read and send chunks, of at most `largest` bytes, until there are none."""
    buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    views = [memoryview(cast(Any, buffer.numpy())) for buffer in buffers]
    sent = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)  # what had the new tensors' memory before may still be used
    turn = 0
    files: dict[Path, FileIO] = {}
    try:
        with ExitStack() as opened, torch.cuda.stream(stream):
            while (chunk := _next(queue)) is not None:
                progress.tick()
                if chunk.path not in files:
                    files[chunk.path] = opened.enter_context(chunk.path.open("rb", buffering=0))
                count = chunk.target.numel()
                sent[turn].synchronize()
                chunk.read(files[chunk.path], views[turn][:count])
                there = buffers[turn][:count].view(chunk.target.shape)
                chunk.target.copy_(there, non_blocking=True)
                sent[turn].record(stream)
                turn = 1 - turn
    except BaseException:
        while _next(queue) is not None:  # the others need not go on
            pass
        raise
    finally:
        stream.synchronize()  # nothing may still be written to tensors that are dropped


def _next(queue: SimpleQueue[Span]) -> Span | None:
    try:
        return queue.get_nowait()
    except Empty:
        return None


def _fill(file: FileIO, view: memoryview, start: int) -> None:
    """Read from `start` on until `view` is full."""
    done = 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], start + done)
        if not count:
            raise CheckpointError(f"{file.name} became shorter while it was read")
        done += count
