"""An artifact: a folder with a manifest, one safetensors file a rank, and tokenizer files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmi_multi import progress
from lmi_multi.checkpoint.atomic import recover
from lmi_multi.checkpoint.files import MANIFEST, file_size, listed, plain_name
from lmi_multi.checkpoint.header import NAMES, read_header
from lmi_multi.checkpoint.layout import DtypeName, QuantizeName, Stored, stored_tensors
from lmi_multi.checkpoint.shard import Piece, pieces
from lmi_multi.checkpoint.share import Share
from lmi_multi.checkpoint.writer import sha256
from lmi_multi.errors import CheckpointError, OptionError
from lmi_multi.models.registry import FAMILIES
from lmi_multi.models.schema import check_degree, valid_degrees
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.stages import Stage, plan_stages

FORMAT_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Strict):
    """Size in bytes and sha256 in hexadecimal of one file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Origin(_Strict):
    """What was converted."""

    name: str
    revision: str | None


class Manifest(_Strict):
    """`lmi_multi.json`. `tensors` are the canonical weights and biases, in the files' order.

    With `quantize`, the weights that it applies to have a `.scale` beside them.
    """

    format_version: int
    lmi_multi: str
    spec: dict[str, Any]
    dtype: DtypeName
    quantize: QuantizeName | None
    tensor_parallel: Annotated[int, Field(ge=1)]
    parameters: Annotated[int, Field(ge=1)]
    source: Origin
    tensors: list[str]
    files: dict[str, FileEntry]

    def only(self, ranks: Iterable[int]) -> dict[str, FileEntry]:
        """`files` without the weights of any but `ranks`. Raises CheckpointError for others."""
        every = {rank_file(rank, self.tensor_parallel) for rank in range(self.tensor_parallel)}
        kept = {rank_file(rank, self.tensor_parallel) for rank in ranks}
        if unknown := sorted(kept - every):
            raise CheckpointError(f"the artifact has no {listed(unknown)}")
        return {n: entry for n, entry in self.files.items() if n not in every or n in kept}


def rank_file(rank: int, degree: int) -> str:
    """The name of a rank's weights."""
    return f"rank-{rank}-of-{degree}.safetensors"


def is_artifact(folder: Path) -> bool:
    """Whether `folder` holds a manifest; nothing in it is checked."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Raises CheckpointError naming the field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{path}: format_version is {version!r:.80}, "
            f"this version of lmi_multi supports {FORMAT_VERSION}"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from None
    _check_files(path, manifest)
    return manifest


def _check_files(path: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if not plain_name(name):
            raise CheckpointError(f"{path}: files names {name!r:.80}, expected plain file names")
    degree = manifest.tensor_parallel
    if degree > len(manifest.files):
        raise CheckpointError(
            f"{path}: tensor_parallel is {degree}, but files has {len(manifest.files)} entries"
        )
    for rank in range(degree):
        if rank_file(rank, degree) not in manifest.files:
            raise CheckpointError(f"{path}: files lacks {rank_file(rank, degree)}")


@dataclass(frozen=True)
class Artifact:
    """An opened artifact whose files have the sizes and headers that its manifest tells."""

    folder: Path
    manifest: Manifest
    spec: ModelSpec
    stored: tuple[Stored, ...]

    @classmethod
    def open(
        cls, folder: str | Path, verify_hashes: bool = False, ranks: Iterable[int] | None = None
    ) -> Artifact:
        """Check sizes and headers of all files (and, on request, hashes); no weights are read.

        With `ranks`, the weights of other ranks may be absent: `load_rank` then serves these, at
        the degree of the files. Raises CheckpointError naming the file, what was expected and what
        is there.
        """
        folder = Path(folder)
        recover(folder)
        if not is_artifact(folder):
            what = f"has no {MANIFEST}" if folder.is_dir() else "does not exist"
            raise CheckpointError(f"{folder} is no artifact: it {what}")
        manifest = read_manifest(folder / MANIFEST)
        spec, stored = _describe(folder / MANIFEST, manifest)
        artifact = cls(folder, manifest, spec, stored)
        chosen = list(range(artifact.tensor_parallel) if ranks is None else ranks)
        for name, entry in manifest.only(chosen).items():
            _check_file(folder / name, entry, verify_hashes)
        for rank in chosen:
            artifact._check_header(rank)
        return artifact

    @classmethod
    def open_share(cls, folder: Path, share: Share | None, verify_hashes: bool = False) -> Artifact:
        """`open` with what `share` needs, the weights of its rank or of all; None: of all."""
        ranks = None
        if share is not None and read_manifest(folder / MANIFEST).tensor_parallel == share.degree:
            ranks = (share.rank,)
        return cls.open(folder, verify_hashes, ranks)

    @property
    def dtype(self) -> DtypeName:
        """The dtype of everything that is not quantized (nor kept wide)."""
        return self.manifest.dtype

    @property
    def quantize(self) -> QuantizeName | None:
        """The weights' quantization."""
        return self.manifest.quantize

    @property
    def tensor_parallel(self) -> int:
        """The degree for which the files are partitioned."""
        return self.manifest.tensor_parallel

    @property
    def digest(self) -> str:
        """What tells these weights from others, by the manifest: 16 hexadecimal digits."""
        told = self.manifest.model_dump_json(include={"spec", "dtype", "quantize", "files"})
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def rank_path(self, rank: int) -> Path:
        """The file of one of the artifact's own ranks."""
        return self.folder / rank_file(rank, self.tensor_parallel)

    def _check_header(self, rank: int) -> None:
        path, degree = self.rank_path(rank), self.tensor_parallel
        infos = read_header(path)
        expected = {tensor.name: tensor for tensor in self.stored}
        for wrong, fault in (
            (sorted(set(expected) - set(infos)), "lacks"),
            (sorted(set(infos) - set(expected)), "holds unexpected"),
        ):
            if wrong:
                raise CheckpointError(f"{path} {fault} tensors: {listed(wrong)}")
        for name, tensor in expected.items():
            want = f"{NAMES[tensor.dtype]} {list(tensor.local_shape(degree))}"
            have = f"{NAMES[infos[name].dtype]} {list(infos[name].shape)}"
            if want != have:
                raise CheckpointError(f"{path}: tensor {name!r} is {have}, expected {want}")

    def check_rank(self, rank: int, degree: int) -> None:
        """Raise OptionError, which lists the valid ones, when `degree` or `rank` is invalid."""
        check_degree(self.spec, degree)
        if not 0 <= rank < degree:
            raise OptionError(f"rank is {rank}, must be in 0..{degree - 1}")

    def tensor_bytes(self, rank: int, degree: int, names: Container[str] | None = None) -> int:
        """The bytes of weights that `load_rank` brings, from shapes alone."""
        self.check_rank(rank, degree)
        return sum(tensor.nbytes(degree) for tensor in self.wanted(names))

    def stages(self, count: int) -> list[Stage]:
        """The network cut into `count` pipeline stages. Raises OptionError if it cannot be."""
        sizes = {tensor.name: tensor.nbytes(1) for tensor in self.stored}
        return plan_stages(self.spec, sizes, count)

    def wanted(self, names: Container[str] | None) -> list[Stored]:
        """The stored tensors of these names; None: all."""
        return [t for t in self.stored if names is None or t.name in names]

    def load_rank(
        self, rank: int, degree: int, names: Container[str] | None = None
    ) -> dict[str, Tensor]:
        """Canonical names -> CPU tensors of `rank` of `degree`, whatever degree the files have.

        Only what is needed is read: of the tensors those with these `names`; None: all. Vocabulary
        rows beyond the vocabulary are zeros. Raises OptionError for a degree at which the network
        cannot be split, CheckpointError when a file changed since it was opened.
        """
        self.check_rank(rank, degree)
        with self._open_ranks() as files:
            return {t.name: self._load(files, t, rank, degree) for t in self.wanted(names)}

    def _load(self, files: _RankFiles, tensor: Stored, rank: int, degree: int) -> Tensor:
        progress.tick()
        if degree == self.tensor_parallel:
            return files.tensor(rank, tensor.name)
        return self._resplit(files, tensor, rank, degree)

    def _resplit(self, files: _RankFiles, tensor: Stored, rank: int, degree: int) -> Tensor:
        split = tensor.split
        if split is None:
            return files.tensor(0, tensor.name)
        size, stored = tensor.shape[split.dim], self.tensor_parallel
        parts = [
            files.piece(tensor, split.dim, piece)
            for piece in pieces(split, size, stored, degree, rank)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, split.dim)

    @contextmanager
    def _open_ranks(self) -> Iterator[_RankFiles]:
        files = _RankFiles([self.rank_path(rank) for rank in range(self.tensor_parallel)])
        try:
            yield files
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder} changed while it was read: {error}") from None
        finally:
            files.close()


class _RankFiles:
    """The rank files of an artifact, opened when first needed."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: dict[int, Any] = {}
        self._stack = ExitStack()

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            file = safe_open(self._paths[rank], framework="pt")
            self._open[rank] = self._stack.enter_context(file)
        return self._open[rank]

    def tensor(self, rank: int, name: str) -> Tensor:
        tensor: Tensor = self._file(rank).get_tensor(name)
        return tensor

    def piece(self, tensor: Stored, dim: int, piece: Piece) -> Tensor:
        if piece.rank is None:
            shape = list(tensor.shape)
            shape[dim] = piece.size
            return torch.zeros(shape, dtype=tensor.dtype)
        where = slice(piece.start, piece.start + piece.size)
        view = self._file(piece.rank).get_slice(tensor.name)
        result: Tensor = view[where] if dim == 0 else view[:, where]
        return result

    def close(self) -> None:
        self._stack.close()


def _describe(path: Path, manifest: Manifest) -> tuple[ModelSpec, tuple[Stored, ...]]:
    """Spec and stored tensors; the manifest's tensors must be those that the family has."""
    try:
        spec = ModelSpec.from_dict(manifest.spec)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    degree = manifest.tensor_parallel
    if degree not in valid_degrees(spec, degree):
        raise CheckpointError(f"{path}: tensor_parallel is {degree}, which the spec cannot have")
    family = next((family for family in FAMILIES if family.name == spec.family), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise CheckpointError(f"{path}: spec.family is {spec.family!r}, expected one of {known}")
    names = set(manifest.tensors)
    if spec.encoder_layers + spec.decoder_layers > len(names):
        raise CheckpointError(f"{path}: tensors has {len(names)} names, too few for the spec")
    table = family.weights(spec)
    missing = [
        f"{module}.weight"
        for module, weight in table.items()
        if not weight.optional and f"{module}.weight" not in names
    ]
    if missing:
        raise CheckpointError(f"{path}: tensors lacks {listed(missing)}")
    possible = {f"{module}.{part}" for module in table for part in ("weight", "bias")}
    unknown = sorted(names - possible)
    if unknown or len(names) != len(manifest.tensors):
        raise CheckpointError(f"{path}: tensors has unknown or repeated names: {listed(unknown)}")
    try:
        stored = stored_tensors(spec, manifest.tensors, manifest.dtype, manifest.quantize)
    except KeyError as error:
        raise CheckpointError(f"{path}: the spec has no tensor {error}") from None
    return spec, tuple(stored)


def _check_file(path: Path, entry: FileEntry, verify_hashes: bool) -> None:
    size = file_size(path)
    if size != entry.size:
        raise CheckpointError(f"{path} has {size} bytes, expected {entry.size}")
    if verify_hashes:
        actual = sha256(path)
        if actual != entry.sha256:
            raise CheckpointError(f"{path} has sha256 {actual}, expected {entry.sha256}")
