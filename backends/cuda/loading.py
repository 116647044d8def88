"""Weights from a file straight to the GPU: no full copy of them in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, cast

import torch
from torch import Tensor

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.header import TensorInfo, read_header
from lmi_multi.errors import CheckpointError

THREADS = 8
CHUNK = 16 * 2**20  # bytes of a pinned buffer, of which each thread fills one while one is sent


@dataclass(frozen=True)
class Piece:
    """Bytes of the file from `start` on, and where on the device they go: uint8."""

    start: int
    target: Tensor


def load_rank(artifact: Artifact, rank: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """`Artifact.load_rank` on `device`. Ranks that the artifact was not written for are put
    together in host memory first. Raises the errors of `Artifact.load_rank`."""
    if size != artifact.tensor_parallel:
        whole = artifact.load_rank(rank, size)
        return {name: tensor.to(device) for name, tensor in whole.items()}
    artifact.check_rank(rank, size)
    path = artifact.rank_path(rank)
    try:
        return read_file(path, read_header(path), device)
    except OSError as error:
        raise CheckpointError(f"{artifact.folder} changed while it was read: {error}") from None


def read_file(path: Path, infos: dict[str, TensorInfo], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file on a GPU. Raises CheckpointError if it became shorter."""
    tensors = {
        name: torch.empty(info.shape, dtype=info.dtype, device=device)
        for name, info in infos.items()
    }
    pieces: SimpleQueue[Piece] = SimpleQueue()
    for name, info in infos.items():
        for piece in _pieces(info.start, tensors[name]):
            pieces.put(piece)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record(torch.cuda.current_stream(device))
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(_send, path, pieces, device, ready) for _ in range(THREADS)]:
            done.result()
    return tensors


def _pieces(start: int, tensor: Tensor) -> Iterator[Piece]:
    if tensor.numel() == 0:
        return
    place = start
    flat = tensor.view(-1).view(torch.uint8)
    for first in range(0, len(flat), CHUNK):
        part = flat[first : first + CHUNK]
        yield Piece(place, part)
        place += len(part)


def _send(
    path: Path, pieces: SimpleQueue[Piece], device: torch.device, ready: torch.cuda.Event
) -> None:
    """Read and send pieces until there are none."""
    buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    views = [memoryview(cast(Any, buffer.numpy())) for buffer in buffers]
    sent = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)  # what had the new tensors' memory before may still be used
    turn = 0
    try:
        with path.open("rb", buffering=0) as file, torch.cuda.stream(stream):
            while (piece := _next(pieces)) is not None:
                count = len(piece.target)
                sent[turn].synchronize()
                file.seek(piece.start)
                _fill(file, views[turn][:count])
                piece.target.copy_(buffers[turn][:count], non_blocking=True)
                sent[turn].record(stream)
                turn = 1 - turn
    except BaseException:
        while _next(pieces) is not None:  # the others need not go on
            pass
        raise
    finally:
        stream.synchronize()  # nothing may still be written to tensors that are dropped


def _next(pieces: SimpleQueue[Piece]) -> Piece | None:
    try:
        return pieces.get_nowait()
    except Empty:
        return None


def _fill(file: FileIO, view: memoryview) -> None:
    """Read until `view` is full."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{file.name} became shorter while it was read")
        done += count
