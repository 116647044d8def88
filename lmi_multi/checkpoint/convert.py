"""From a checkpoint to an artifact, tensor by tensor."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from lmi_multi.checkpoint.artifact import (
    FORMAT_VERSION,
    Artifact,
    FileEntry,
    Manifest,
    Origin,
    is_artifact,
    rank_file,
)
from lmi_multi.checkpoint.atomic import replacing, sync
from lmi_multi.checkpoint.files import MANIFEST, gib
from lmi_multi.checkpoint.formats import open_reader
from lmi_multi.checkpoint.layout import (
    DtypeName,
    QuantizeName,
    Stored,
    file_order,
    parameters,
    stored_tensors,
)
from lmi_multi.checkpoint.plan import Entry, Plan, fuse, make_plan
from lmi_multi.checkpoint.quantize import quantize as quantized
from lmi_multi.checkpoint.reader import Reader
from lmi_multi.checkpoint.s3.address import is_address
from lmi_multi.checkpoint.shard import local_chunks
from lmi_multi.checkpoint.source import Source, resolve
from lmi_multi.checkpoint.writer import Progress as Progress
from lmi_multi.checkpoint.writer import RankFile, sha256
from lmi_multi.errors import CapacityError, CheckpointError, OptionError
from lmi_multi.models.schema import check_degree
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.weights import LARGEST

CHUNK_ELEMENTS = 2 * 2**20
_MARGIN = 2**20  # manifest, headers and the file system's own blocks


def convert(
    source: str | Path | Source,
    target: str | Path,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    tensor_parallel: int = 1,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the checkpoint `source` as an artifact into the folder `target`, and open it.

    `dtype`: auto (the checkpoint's own; bf16 for T5 in place of fp16), fp32, fp16 or bf16.
    `quantize`: None, "int8" or "fp8" (e4m3), weights only. `tensor_parallel`: one file for each of
    so many ranks. `progress` is called as bytes are written. Memory use is that of about two of
    the largest tensors. The target appears whole or not at all; an artifact there is replaced.

    Raises OptionError (invalid options), CheckpointError (a source that cannot be used, a target
    that is neither empty nor an artifact) and CapacityError (too little free disk space).
    """
    check_options(dtype, quantize, tensor_parallel)
    if is_address(target):
        raise OptionError(f"target is {target!r}, must be a folder; `publish` writes to S3")
    if isinstance(source, Source):
        if revision is not None:
            raise OptionError("revision: a resolved source already has one")
    else:
        source = resolve(source, revision, progress)
    if is_artifact(source.folder):
        raise CheckpointError(f"{source.folder} is an artifact already, expected a checkpoint")
    reader = open_reader(source.folder)
    plan = make_plan(source.folder, reader)
    check_degree(plan.spec, tensor_parallel)
    target = Path(target).expanduser().resolve()
    job = _Job(source, reader, plan, chosen_dtype(plan, dtype), quantize, tensor_parallel, progress)
    try:
        with replacing(target, is_artifact) as partial:
            job.check_space(target.parent)
            job.write(partial)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise job.no_space(target.parent) from None
        raise CheckpointError(f"{target} cannot be written: {error}") from None
    return Artifact.open(target)


def check_options(
    dtype: str, quantize: str | None, tensor_parallel: int, pipeline_parallel: int = 1
) -> None:
    """Raise OptionError, which names what is allowed, for an invalid option of a conversion, or of
    a load that begins with one."""
    dtypes = ("auto", *get_args(DtypeName))
    if dtype not in dtypes:
        raise OptionError(f"dtype is {dtype!r}, must be one of {', '.join(dtypes)}")
    kinds = get_args(QuantizeName)
    if quantize is not None and quantize not in kinds:
        raise OptionError(f"quantize is {quantize!r}, must be one of None, {', '.join(kinds)}")
    degrees = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    for name, degree in degrees.items():
        if type(degree) is not int or degree < 1:
            raise OptionError(f"{name} is {degree!r:.80}, must be an integer above 0")


def chosen_dtype(plan: Plan, dtype: str) -> DtypeName:
    """What `dtype` means for this checkpoint."""
    if dtype != "auto":
        return cast(DtypeName, dtype)
    return "bf16" if plan.spec.wide_residual and plan.dtype == "fp16" else plan.dtype


class _Job:
    """One conversion, from a plan to the files of an artifact."""

    def __init__(
        self,
        source: Source,
        reader: Reader,
        plan: Plan,
        dtype: DtypeName,
        quantize: str | None,
        degree: int,
        progress: Progress | None,
    ) -> None:
        self.source, self.reader, self.plan = source, reader, plan
        self.dtype, self.degree, self.progress = dtype, degree, progress
        self.quantize = cast("QuantizeName | None", quantize)
        self.stored = stored_tensors(plan.spec, plan.tensors, dtype, self.quantize)
        self.side_files = reader.side_files()
        self.total = degree * sum(tensor.nbytes(degree) for tensor in self.stored)
        self.done = 0

    @property
    def needed(self) -> int:
        """Bytes of disk that the artifact takes."""
        beside = sum(
            len(item) if isinstance(item, bytes) else item.stat().st_size
            for item in self.side_files.values()
        )
        return self.total + beside + _MARGIN

    def check_space(self, folder: Path) -> None:
        """Raise CapacityError unless `folder`'s disk has room for the artifact."""
        free = shutil.disk_usage(folder).free
        if free < self.needed:
            raise CapacityError(
                f"{folder} has {gib(free)} free, the artifact needs {gib(self.needed)}: "
                f"{gib(self.needed - free)} are missing"
            )

    def no_space(self, folder: Path) -> CapacityError:
        """The error for a disk that filled up on the way; what was written is removed by now."""
        free = shutil.disk_usage(folder).free
        # Where there is room by now, another process took it for a while.
        missing = self.needed - (free if free < self.needed else self.done)
        return CapacityError(
            f"the disk of {folder} filled up, and what was written is removed again: the artifact "
            f"needs {gib(self.needed)}, which is {gib(missing)} more than there was room for"
        )

    def write(self, folder: Path) -> None:
        """Write every file of the artifact into `folder`, the manifest last."""
        files = self._write_ranks(folder)
        for name, item in self.side_files.items():
            copy = folder / name
            if isinstance(item, bytes):
                copy.write_bytes(item)
            else:
                shutil.copyfile(item, copy)
            sync(copy)
            files[name] = FileEntry(size=copy.stat().st_size, sha256=sha256(copy))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            lmi_multi=_own_version(),
            spec=self.plan.spec.to_dict(),
            dtype=self.dtype,
            quantize=self.quantize,
            tensor_parallel=self.degree,
            parameters=parameters(self.plan.spec, self.plan.tensors),
            source=Origin(name=self.source.name, revision=self.source.revision),
            tensors=self.plan.tensors,
            files=files,
        )
        path = folder / MANIFEST
        path.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        sync(path)

    def _write_ranks(self, folder: Path) -> dict[str, FileEntry]:
        order = file_order(self.stored, self.degree)
        ranks: list[RankFile] = []
        try:
            for rank in range(self.degree):
                ranks.append(RankFile(folder / rank_file(rank, self.degree), order, self.degree))
            stored = {tensor.name: tensor for tensor in self.stored}
            for entry in self.plan.entries:
                for name, tensor in self._tensors(entry, stored):
                    self._write_tensor(ranks, stored[name], tensor, entry)
                    del tensor  # before the next entry is read
            return {
                file.path.name: FileEntry(sha256=file.finish(), size=file.size) for file in ranks
            }
        finally:
            for file in ranks:
                file.close()

    def _tensors(self, entry: Entry, stored: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
        """The whole tensors that `entry` becomes: itself, or codes and their scale."""
        dtype = stored[entry.name].dtype
        if dtype not in LARGEST:
            yield entry.name, load(self.reader, entry, self.plan.spec)
            return
        codes, scale = quantized(load(self.reader, entry, self.plan.spec), dtype)
        yield entry.name, codes
        yield entry.name.removesuffix("weight") + "scale", scale

    def _write_tensor(
        self, ranks: list[RankFile], stored: Stored, tensor: Tensor, entry: Entry
    ) -> None:
        for rank, file in enumerate(ranks):
            chunks = local_chunks(tensor, stored.split, self.degree, rank, CHUNK_ELEMENTS)
            for size in file.write(stored.name, (_cast(c, stored.dtype, entry) for c in chunks)):
                self.done += size
                if self.progress is not None:
                    self.progress(self.done, self.total, stored.name)


def load(reader: Reader, entry: Entry, spec: ModelSpec) -> Tensor:
    """The canonical tensor of `entry`, whole, in the checkpoint's dtype.

    Raises CheckpointError naming the source tensor that holds NaN or infinity.
    """
    if len(entry.sources) == 1:
        whole = reader.read(entry.sources[0])
        _check_finite(whole, entry.sources[0])
    else:
        infos = [reader.tensors[name] for name in entry.sources]
        dtype = infos[0].dtype
        for info in infos[1:]:
            dtype = torch.promote_types(dtype, info.dtype)
        rows = [info.shape[0] for info in infos]
        whole = torch.empty((sum(rows), *infos[0].shape[1:]), dtype=dtype)
        start = 0
        for name, count in zip(entry.sources, rows, strict=True):
            part = whole[start : start + count].copy_(reader.read(name))
            _check_finite(part, name)
            start += count
    return fuse([whole], entry.fix, spec)


def _check_finite(tensor: Tensor, name: str) -> None:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK_ELEMENTS):
        finite = torch.isfinite(flat[start : start + CHUNK_ELEMENTS])
        if not finite.all():
            count = int((~finite).sum())
            raise CheckpointError(f"tensor {name!r} holds NaN or infinity ({count} values or more)")


def _cast(chunk: Tensor, dtype: torch.dtype, entry: Entry) -> Tensor:
    result = chunk.to(dtype)
    if dtype in (torch.float16, torch.float32, torch.bfloat16) and dtype != chunk.dtype:
        overflow = result.isinf()
        if overflow.any():
            largest = float(chunk[overflow].abs().max())
            hint = "; use bf16" if dtype == torch.float16 else ""
            raise CheckpointError(
                f"tensor {' + '.join(entry.sources)} holds {largest:.6g}, expected at most "
                f"{torch.finfo(dtype).max:.6g} for {str(dtype).removeprefix('torch.')}{hint}"
            )
    return result


def _own_version() -> str:
    try:
        return version("lmi_multi")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
