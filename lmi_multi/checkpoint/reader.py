"""Reads a checkpoint folder tensor by tensor: safetensors or .bin, single or sharded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lmi_multi.checkpoint.files import SIDE_FILES, file_size, listed, matching, plain_name
from lmi_multi.checkpoint.header import TensorInfo, read_header, refuse_pointer
from lmi_multi.errors import CheckpointError
from lmi_multi.models.config import Config

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MAP_BUDGET = 256 * 2**20


class Reader(Protocol):
    """A checkpoint folder of any layout, presented under the names that its family knows."""

    folder: Path
    paths: list[Path]
    tensors: dict[str, TensorInfo]

    def config(self) -> Config:
        """The checkpoint's config.json."""

    def side_files(self) -> dict[str, Path | bytes]:
        """What an artifact carries beside the weights, by name: a file to copy, or its content."""

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The tensor `name`, or its rows [start, stop), as a contiguous CPU tensor of its own."""


class WeightFile(Protocol):
    """One file with tensors."""

    path: Path
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The tensor `name`, or its rows [start, stop), in fresh CPU memory."""


class SafetensorsFile:
    """A safetensors file. Data is read, not mapped, so that memory use stays what is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = read_header(path)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """See `WeightFile.read`. Raises CheckpointError when the file became shorter."""
        info = self.tensors[name]
        shape, offset = info.shape, info.start
        if start is not None and stop is not None:
            row = info.nbytes // shape[0] if shape[0] else 0
            shape, offset = (stop - start, *shape[1:]), offset + start * row
        result = torch.empty(shape, dtype=info.dtype)
        view = result.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                got = _read_all(file, view)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from None
        if got != len(view):
            raise CheckpointError(
                f"{self.path}: tensor {name!r} ends after {got} bytes, expected {len(view)}"
            )
        return result


def _read_all(file: Any, view: memoryview) -> int:
    """Fill `view`; one read call stops at 2 GiB, or earlier."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done


class TorchFile:
    """A pickled state dict, loaded with `weights_only`; zip files are mapped, not read whole.

    Pages that were read stay resident while the map lives, so the map is renewed now and then.
    Files from before torch 1.6 are no zip and cannot be mapped: they are read whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file_size(path)
        try:
            with path.open("rb") as file:
                head = file.read(512)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        refuse_pointer(path, head)
        if not head:
            raise CheckpointError(f"{path} has 0 bytes, expected a PyTorch file")
        self._mapped = head.startswith(b"PK")
        self._state: dict[str, Tensor] | None = self._load()
        self._used = 0
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._state.items()
        }
        if not self._mapped:
            self._state = None

    def _load(self) -> dict[str, Tensor]:
        try:
            state = torch.load(  # noqa: TID251
                self.path, map_location="cpu", mmap=self._mapped, weights_only=True
            )
        except Exception as error:  # torch raises whatever the malformed bytes lead to
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{self.path} is not a readable PyTorch file of tensors: {reason:.200}"
            ) from None
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{self.path} holds a {type(state).__name__}, expected a dict of tensors"
            )
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{self.path}: {name!r} is a {type(value).__name__}, expected a tensor"
                )
            if value.layout != torch.strided or value.is_quantized:
                raise CheckpointError(f"{self.path}: {name!r} is not a dense tensor")
        return state

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """See `WeightFile.read`."""
        if self._state is None or (self._mapped and self._used > _MAP_BUDGET):
            self._state, self._used = None, 0  # drop the old map before the new one
            self._state = self._load()
        tensor = self._state[name]
        if start is not None:
            tensor = tensor[start:stop]
        self._used += tensor.nbytes
        return tensor.clone(memory_format=torch.contiguous_format)

    def release(self) -> None:
        """Give back the map, or the memory of a file that was read whole."""
        self._state = None


class CheckpointReader:
    """All tensors of a checkpoint folder: `tensors` tells shapes and dtypes, `read` brings data.

    Raises CheckpointError, naming file, expected and actual, when weights are missing, malformed,
    truncated, or disagree with their index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, WeightFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._last: WeightFile | None = None
        names, index = _weight_files(folder)
        self.paths = [folder / name for name in names]
        for path in self.paths:
            self._add(SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path))
        if index is not None:
            self._check_index(*index)

    def _add(self, file: WeightFile) -> None:
        for name, info in file.tensors.items():
            if name in self._where:
                raise CheckpointError(
                    f"tensor {name!r} is in {self._where[name].path} and in {file.path}, "
                    "expected in one file"
                )
            self._where[name], self.tensors[name] = file, info

    def _check_index(self, index: Path, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            actual = self._where[name].path.name if name in self._where else "no file"
            if actual != file:
                raise CheckpointError(
                    f"{index}: tensor {name!r} is in {actual}, expected in {file}"
                )
        extra = sorted(set(self._where) - set(weight_map))
        if extra:
            raise CheckpointError(
                f"{self._where[extra[0]].path} holds tensors that {index} does not name: "
                f"{listed(extra)}"
            )

    def config(self) -> Config:
        """Its config.json. Raises CheckpointError when it is missing or malformed."""
        return Config.read(self.folder)

    def side_files(self) -> dict[str, Path | bytes]:
        """See `Reader.side_files`."""
        return {path.name: path for path in matching(self.folder, SIDE_FILES)}

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The tensor `name`, or its rows [start, stop), as a contiguous CPU tensor of its own."""
        file = self._where[name]
        if isinstance(self._last, TorchFile) and self._last is not file:
            self._last.release()
        self._last = file
        return file.read(name, start, stop)


def _weight_files(folder: Path) -> tuple[list[str], tuple[Path, dict[str, str]] | None]:
    """The files to read, and the index with its map when there is one."""
    for single, index in (SAFETENSORS, BIN):
        if (folder / single).exists():
            return [single], None
        if (folder / index).exists():
            weight_map = read_index(folder / index, Path(single).suffix)
            return sorted(set(weight_map.values())), (folder / index, weight_map)
    found = _weight_like(folder)
    raise CheckpointError(
        f"{folder} has no weights: expected {', '.join(SAFETENSORS + BIN)}; "
        f"found {listed(found) if found else 'none of their kind'}"
    )


def _weight_like(folder: Path) -> list[str]:
    kinds = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".ckpt", ".pt", ".pth", ".onnx")
    return sorted(path.name for path in folder.iterdir() if path.suffix in kinds)


def read_index(path: Path, suffix: str) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> file name beside it, which ends in `suffix`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {weight_map!r:.80}, expected names and files")
    _check_names(path, weight_map.values(), suffix)
    for file in sorted(set(weight_map.values())):
        if not (path.parent / file).exists():
            raise CheckpointError(f"{path.parent / file} is missing, expected by {path.name}")
    return weight_map


def _check_names(path: Path, files: Iterable[Any], suffix: str) -> None:
    for file in files:
        if not isinstance(file, str) or not plain_name(file) or not file.endswith(suffix):
            raise CheckpointError(
                f"{path}: weight_map names file {file!r:.80}, expected a *{suffix} file beside it"
            )
