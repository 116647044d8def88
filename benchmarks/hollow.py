"""Artifacts of true sizes whose weights are a hole in a file: made at once, and loaded as any."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import lmi_multi
from benchmarks.shapes import SHAPES, Shape
from lmi_multi.checkpoint.artifact import (
    FORMAT_VERSION,
    Artifact,
    FileEntry,
    Manifest,
    Origin,
    rank_file,
)
from lmi_multi.checkpoint.files import MANIFEST
from lmi_multi.checkpoint.header import build_header
from lmi_multi.checkpoint.layout import (
    DtypeName,
    QuantizeName,
    file_order,
    parameters,
    stored_tensors,
)
from lmi_multi.models.config import Config
from lmi_multi.models.registry import family_of
from lmi_multi.models.spec import ModelSpec

_UNKNOWN = "0" * 64  # a hash that nobody compares


def outline(shape: Shape) -> tuple[ModelSpec, list[str]]:
    """The spec of a shape, and the names of its canonical tensors."""
    model = shape.build(torch.bfloat16, "meta")
    fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
    family = family_of(fields["architectures"][0])
    spec = family.spec(Config(fields))
    known = {key.removeprefix(family.base) for key in model.state_dict()}
    return spec, [
        f"{module}.{part}"
        for module, weight in family.weights(spec).items()
        for part in ("weight", "bias")
        if all(f"{source}.{part}" in known for source in weight.sources)
    ]


def hollow_artifact(
    name: str, dtype: DtypeName, quantize: QuantizeName | None, folder: Path
) -> Artifact:
    """Write the artifact of shape `name` into `folder`, for one rank. All its weights are zero, and
    take no room where the file system knows holes. It has no tokenizer, and no end token."""
    spec, names = outline(SHAPES[name])
    stored = file_order(stored_tensors(spec, names, dtype, quantize), 1)
    header, infos = build_header([(t.name, t.local_shape(1), t.dtype) for t in stored])
    size = max(info.stop for info in infos.values())
    with (folder / rank_file(0, 1)).open("wb") as file:
        file.write(header)
        file.truncate(size)
    start = {"decoder_start_token_id": 0} if spec.kind == "encoder-decoder" else {}
    (folder / "generation_config.json").write_text(json.dumps(start))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        lmi_multi=lmi_multi.__version__,
        spec=spec.to_dict(),
        dtype=dtype,
        quantize=quantize,
        tensor_parallel=1,
        parameters=parameters(spec, names),
        source=Origin(name=f"{name}, hollow", revision=None),
        tensors=names,
        files={rank_file(0, 1): FileEntry(size=size, sha256=_UNKNOWN)},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return Artifact.open(folder)
