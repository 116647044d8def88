"""The safetensors format: checking a header before anything trusts it, and building one.

A file is 8 bytes of little-endian length, that many bytes of JSON, then the tensors' data without
gaps or overlaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmi_multi.checkpoint.files import file_size
from lmi_multi.errors import CheckpointError

MAX_HEADER = 100_000_000
ALIGNMENT = 64
LFS_POINTER = b"version https://git-lfs"
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LIMIT = 2**63  # sizes and offsets are 64-bit signed wherever they are used


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: shape, dtype, and its bytes [start, stop) counted from the file's start."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0
    stop: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raise CheckpointError when `head`, the file's first bytes, belongs to a git-LFS pointer."""
    if not head.startswith(LFS_POINTER):
        return
    sizes = [line[5:].strip() for line in head.split(b"\n") if line.startswith(b"size ")]
    expected = f"{sizes[0].decode('ascii', 'replace')} bytes of weights" if sizes else "weights"
    raise CheckpointError(
        f"{path} is a git-LFS pointer, expected {expected}: fetch them with `git lfs pull`"
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, fully checked against the file's size; no data is read.

    Raises CheckpointError naming the file, what was expected and what is there.
    """
    size = file_size(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
            refuse_pointer(path, head)
            length = _header_length(path, head, size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) != length:
        raise CheckpointError(f"{path}: header has {len(raw)} bytes, expected {length}")
    infos = {
        name: _entry(f"{path}: tensor {name!r}", entry, 8 + length)
        for name, entry in _parse(path, raw).items()
        if name != "__metadata__"
    }
    _check_cover(path, infos, 8 + length, size)
    return infos


def _header_length(path: Path, head: bytes, size: int) -> int:
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, expected a safetensors file of at least 8")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: header length is {length} bytes, expected at most {MAX_HEADER}: "
            "not a safetensors file, or altered"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes, expected at least {8 + length} for its header"
        )
    return length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: header names {twice!r} twice, expected it once")
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a {type(header).__name__}, expected an object")
    return header


def _entry(where: str, entry: Any, base: int) -> TensorInfo:
    """One entry of the header as TensorInfo; `base` is where the data begins in the file."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {entry!r:.80}")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype is {name!r:.80}, expected one of {', '.join(DTYPES)}"
        )
    if (
        not _naturals(shape)
        or len(shape) > 64
        or math.prod(shape) * DTYPES[name].itemsize >= _LIMIT
    ):
        raise CheckpointError(
            f"{where}: shape is {shape!r:.80}, expected sizes whose product fits 63 bits"
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets is {offsets!r:.80}, expected [start, stop] with start <= stop"
        )
    info = TensorInfo(tuple(shape), DTYPES[name], base + offsets[0], base + offsets[1])
    if info.nbytes != info.stop - info.start:
        raise CheckpointError(
            f"{where}: data_offsets span {info.stop - info.start} bytes, "
            f"expected {info.nbytes} for {name} {list(shape)}"
        )
    return info


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < _LIMIT for v in values)


def _check_cover(path: Path, infos: dict[str, TensorInfo], base: int, size: int) -> None:
    """Every byte behind the header must belong to exactly one tensor."""
    end = base
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            fault = (
                "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            )
            raise CheckpointError(
                f"{path}: tensor {name!r} {fault}: data starts at byte {info.start}, expected {end}"
            )
        end = info.stop
    if end != size:
        fault = "is truncated" if size < end else "has bytes that belong to no tensor"
        raise CheckpointError(f"{path} {fault}: {size} bytes, expected {end}")


def build_header(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The first bytes of a file that holds `tensors` in this order, and where each will lie.

    The header is padded with spaces so that the data starts at a multiple of 64 bytes.
    """
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        infos[name] = TensorInfo(shape, dtype, start, end)
    entries = {
        name: {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [info.start, info.stop],
        }
        for name, info in infos.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    base = 8 + len(text)
    placed = {
        name: TensorInfo(info.shape, info.dtype, base + info.start, base + info.stop)
        for name, info in infos.items()
    }
    return len(text).to_bytes(8, "little") + text, placed
