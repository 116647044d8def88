"""Finds FasterTransformer's files, checks them against their settings, and merges them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from lmi_multi.checkpoint.fastertransformer import ini as settings
from lmi_multi.checkpoint.fastertransformer.bins import Bins, Layout, same
from lmi_multi.checkpoint.fastertransformer.layouts import layout_of
from lmi_multi.checkpoint.files import (
    BIN_FILES,
    MANIFEST,
    SIDE_FILES,
    WEIGHT_FILES,
    file_size,
    listed,
    matches,
    matching,
)
from lmi_multi.checkpoint.header import TensorInfo
from lmi_multi.errors import CheckpointError
from lmi_multi.models.config import Config

_FOLDER = re.compile(r"([1-9][0-9]{0,4})-gpu")
_RANK = re.compile(r"\.([0-9]+)\.bin")


def find(path: Path) -> Path | None:
    """The folder with the raw files: `path`, or its one subfolder `N-gpu`; None if there is none.

    A folder that holds an artifact or Hugging Face's weights is taken for that. Raises
    CheckpointError where several subfolders compete.
    """
    if matching(path, (MANIFEST, *WEIGHT_FILES, *BIN_FILES)):
        return None
    if is_layout(path):
        return path
    folders = [f for f in sorted(path.iterdir()) if _FOLDER.fullmatch(f.name) and is_layout(f)]
    if len(folders) > 1:
        names = [folder.name for folder in folders]
        raise CheckpointError(f"{path} holds {listed(names)}; name one of these folders")
    return folders[0] if folders else None


def is_layout(folder: Path) -> bool:
    """Whether `folder` holds raw files, with settings in it or, for an `N-gpu`, beside it."""
    return _settings(folder) is not None and bool(matching(folder, ("*.bin",)))


def _settings(folder: Path) -> Path | None:
    own, beside = folder / settings.NAME, folder.parent / settings.NAME
    if own.is_file():
        return own
    return beside if _FOLDER.fullmatch(folder.name) and beside.is_file() else None


def files(folder: Path) -> list[Path]:
    """Every file that a conversion of `folder` reads."""
    own = _settings(folder)
    weights = matching(folder, ("*.bin",))
    return [*([own] if own else []), *weights, *_side_files(folder).values()]


def _side_files(folder: Path) -> dict[str, Path]:
    """Tokenizer and other files by name: those in `folder`, else beside an `N-gpu`."""
    folders = [folder.parent, folder] if _FOLDER.fullmatch(folder.name) else [folder]
    return {path.name: path for place in folders for path in matching(place, SIDE_FILES)}


class FasterTransformerReader:
    """Presents raw files as `CheckpointReader` does a checkpoint, under the family's own names.

    Raises CheckpointError, naming file, expected and actual, when a file is missing, is left over
    or has not the size that the settings imply; UnsupportedModelError for another network.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = _settings(folder)
        if path is None:
            raise CheckpointError(f"{folder} has no {settings.NAME}")
        weights = matching(folder, ("*.bin",))
        names = {file.name for file in weights}
        self._layout = layout_of(settings.Ini(path), len(names))
        self._gpus = _gpus(folder, path, self._layout, names)
        self._bins = {
            name: bins
            for name, bins in self._layout.tensors.items()
            if name not in self._layout.optional or names.intersection(bins.names(self._gpus))
        }
        self._check_names(names)
        self._check_sizes()
        self.paths = [path, *weights]
        dtype = self._layout.dtype
        self.tensors = {
            name: TensorInfo(bins.result_shape(), dtype) for name, bins in self._bins.items()
        }

    def config(self) -> Config:
        """The settings as a config.json would tell them."""
        return Config(self._layout.config)

    def side_files(self) -> dict[str, Path | bytes]:
        """What an artifact carries beside the weights: files found here, and the config.json.

        A config.json that lies here is not taken: the settings describe the weights.
        """
        config = json.dumps(self._layout.config, indent=2) + "\n"
        return {**_side_files(self.folder), "config.json": config.encode()}

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """The tensor `name`, or its rows [start, stop), as a contiguous CPU tensor of its own."""
        bins = self._bins[name]
        if start is not None and stop is not None and bins.axis is None and bins.view is same:
            rows = torch.empty((stop - start, *bins.shape[1:]), dtype=self._layout.dtype)
            return self._fill(bins.names(1)[0], rows, start * (rows[:1].nbytes if len(rows) else 0))
        whole = bins.view(self._merge(bins))
        if bins.divided and self._gpus > 1:
            whole = whole * self._gpus
        if start is None:
            return whole.contiguous()
        return whole[start:stop].clone(memory_format=torch.contiguous_format)

    def _merge(self, bins: Bins) -> Tensor:
        """The tensor as stored, the GPUs' parts put together."""
        names, shape = bins.names(self._gpus), bins.file_shape(self._gpus)
        part = torch.empty(shape, dtype=self._layout.dtype)
        if len(names) == 1 or bins.axis is None:
            return self._fill(names[0], part)
        whole = torch.empty(bins.shape, dtype=self._layout.dtype)
        for rank, name in enumerate(names):
            width = shape[bins.axis]
            whole.narrow(bins.axis, rank * width, width).copy_(self._fill(name, part))
        return whole

    def _fill(self, name: str, target: Tensor, offset: int = 0) -> Tensor:
        """Read bytes of a file into `target`."""
        view = target.reshape(-1).view(torch.uint8).numpy().data
        path, done = self.folder / name, 0
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while done < len(view) and (count := file.readinto(view[done:])):
                    done += count  # one call stops at 2 GiB, or earlier
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if done != len(view):
            raise CheckpointError(f"{path} ends after {offset + done} bytes, expected more")
        return target

    def _check_names(self, present: set[str]) -> None:
        """All files that the settings imply are there, and no others."""
        expected = {name for bins in self._bins.values() for name in bins.names(self._gpus)}
        missing = sorted(expected - present)
        if missing:
            raise CheckpointError(f"{self.folder} lacks {listed(missing)}")
        extra = [n for n in sorted(present - expected) if not matches(n, self._layout.ignored)]
        if extra:
            raise CheckpointError(
                f"{self.folder} holds files that {self._layout.config['model_type']} on "
                f"{self._gpus} GPUs does not have: {listed(extra)}"
            )

    def _check_sizes(self) -> None:
        checked: set[str] = set()
        for bins in self._bins.values():
            if bins.axis is not None and bins.shape[bins.axis] % self._gpus:
                raise CheckpointError(
                    f"{self.folder}: {bins.stem} has {bins.shape[bins.axis]} columns to share, "
                    f"which {self._gpus} GPUs cannot"
                )
            for name in bins.names(self._gpus):
                if name not in checked:
                    checked.add(name)
                    self._check_size(name, bins)

    def _check_size(self, name: str, bins: Bins) -> None:
        actual = file_size(self.folder / name)
        expected = bins.file_bytes(self._gpus, self._layout.dtype)
        if actual != expected:
            fault = "is truncated" if actual < expected else "is too long"
            kind = str(self._layout.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.folder / name} {fault}: {actual} bytes, expected {expected} for {kind} "
                f"{list(bins.file_shape(self._gpus))}"
            )


def _gpus(folder: Path, path: Path, layout: Layout, names: set[str]) -> int:
    """For how many GPUs the files are split: by the settings, the folder's name, or the files."""
    named = _FOLDER.fullmatch(folder.name)
    told = {number for number in (layout.gpus, int(named[1]) if named else None) if number}
    if len(told) > 1:
        raise CheckpointError(
            f"{path}: tensor_para_size is {layout.gpus}, but the folder is named {folder.name}"
        )
    if told:
        return told.pop()
    ranks = [int(match[1]) for name in names if (match := _RANK.search(name))]
    return max(ranks, default=0) + 1
