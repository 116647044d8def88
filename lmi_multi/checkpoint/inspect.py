"""Tells what a checkpoint or artifact is, without reading its weights."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from lmi_multi.checkpoint.artifact import Artifact, is_artifact
from lmi_multi.checkpoint.convert import chosen_dtype
from lmi_multi.checkpoint.formats import open_reader
from lmi_multi.checkpoint.layout import (
    DTYPES,
    DtypeName,
    QuantizeName,
    parameters,
    stored_tensors,
)
from lmi_multi.checkpoint.plan import dominant, make_plan
from lmi_multi.checkpoint.reader import CheckpointReader, Reader
from lmi_multi.checkpoint.source import Source, resolve
from lmi_multi.checkpoint.writer import Progress
from lmi_multi.fallback.foreign import Foreign, is_declared
from lmi_multi.models.schema import valid_degrees


class Description(BaseModel):
    """What `lmi-multi inspect` shows. Sizes of files and ranks are in bytes.

    `engine` runs it: this package's own, or transformers, which `load` must be asked for as a
    `fallback`. Of what transformers runs, every tensor counts as a parameter, and whether the head
    is tied is not known.
    `dtype` is the artifact's, or a checkpoint's own. `bytes_per_rank` are the weights that each of
    `tensor_parallel` ranks holds; for a checkpoint, those of its conversion with default options.
    `verified`: whether hashes were compared ("no hashes": a checkpoint has none).
    """

    kind: Literal["artifact", "checkpoint"]
    engine: Literal["lmi_multi", "transformers"]
    path: str
    family: str
    architecture: str | None
    sizes: dict[str, Any]
    parameters: int
    tied_head: bool | None
    dtype: DtypeName
    quantize: QuantizeName | None
    tensor_parallel: int
    bytes_per_rank: int
    degrees: list[int]
    files: dict[str, int]
    source: str
    revision: str | None
    verified: Literal["yes", "not requested", "no hashes"]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return self.model_dump(mode="json")


def describe(
    source: str | Path,
    verify: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Description:
    """Describe the artifact or checkpoint `source`; every header is checked against its config.

    `verify` compares the hashes of an artifact's files; `progress` tells of a download. Raises
    the errors of `resolve`, `Artifact.open` and `make_plan`.
    """
    found = resolve(source, revision, progress)
    if is_artifact(found.folder):
        return _artifact(found, verify)
    return _checkpoint(found) if is_declared(found.folder) else _foreign(found)


def _artifact(source: Source, verify: bool) -> Description:
    artifact = Artifact.open(source.folder, verify)
    manifest, spec = artifact.manifest, artifact.spec
    return Description(
        kind="artifact",
        engine="lmi_multi",
        path=str(artifact.folder),
        family=spec.family,
        architecture=_architecture(artifact.folder),
        sizes=_sizes(manifest.spec),
        parameters=manifest.parameters,
        tied_head="head.weight" not in manifest.tensors and spec.kind != "encoder",
        dtype=artifact.dtype,
        quantize=artifact.quantize,
        tensor_parallel=artifact.tensor_parallel,
        bytes_per_rank=artifact.tensor_bytes(0, artifact.tensor_parallel),
        degrees=valid_degrees(spec),
        files={name: entry.size for name, entry in manifest.files.items()},
        source=manifest.source.name,
        revision=manifest.source.revision,
        verified="yes" if verify else "not requested",
    )


def _checkpoint(source: Source) -> Description:
    reader = open_reader(source.folder)
    plan = make_plan(source.folder, reader)
    spec = plan.spec
    stored = stored_tensors(spec, plan.tensors, chosen_dtype(plan, "auto"), None)
    return Description(
        kind="checkpoint",
        engine="lmi_multi",
        path=str(source.folder),
        family=spec.family,
        architecture=plan.architecture,
        sizes=_sizes(spec.to_dict()),
        parameters=parameters(spec, plan.tensors),
        tied_head="head.weight" not in plan.tensors and spec.kind != "encoder",
        dtype=plan.dtype,
        quantize=None,
        tensor_parallel=1,
        bytes_per_rank=sum(tensor.nbytes(1) for tensor in stored),
        degrees=valid_degrees(spec),
        files=_files(reader),
        source=source.name,
        revision=source.revision,
        verified="no hashes",
    )


def _foreign(source: Source) -> Description:
    foreign = Foreign.read(source.folder)
    reader = CheckpointReader(source.folder)
    infos = reader.tensors.values()
    count, dtype = sum(math.prod(info.shape) for info in infos), dominant(infos)
    return Description(
        kind="checkpoint",
        engine="transformers",
        path=str(source.folder),
        family=foreign.spec.family,
        architecture=foreign.architecture,
        sizes=_sizes(asdict(foreign.spec)) | {"max_positions": foreign.positions},
        parameters=count,
        tied_head=None,
        dtype=dtype,
        quantize=None,
        tensor_parallel=1,
        bytes_per_rank=count * DTYPES[dtype].itemsize,
        degrees=[1],
        files=_files(reader),
        source=source.name,
        revision=source.revision,
        verified="no hashes",
    )


def _files(reader: Reader) -> dict[str, int]:
    """Sizes of the files that loading reads."""
    beside = (item for item in reader.side_files().values() if isinstance(item, Path))
    return {path.name: path.stat().st_size for path in (*reader.paths, *beside)}


def _sizes(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name != "family"}


def _architecture(folder: Path) -> str | None:
    """The class that an artifact's config.json names; the file is optional there."""
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        return str(names[0])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
