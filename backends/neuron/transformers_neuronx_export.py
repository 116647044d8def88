"""From an artifact back to a checkpoint with Hugging Face's names, for transformers-neuronx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.atomic import replacing
from lmi_multi.checkpoint.files import MANIFEST, cache_dir
from lmi_multi.checkpoint.lock import locked
from lmi_multi.checkpoint.writer import sha256
from lmi_multi.errors import CheckpointError
from lmi_multi.models import layouts
from lmi_multi.models.family import Fix
from lmi_multi.models.schema import schema
from lmi_multi.models.spec import ModelSpec

from .transformers_neuronx_ports import LIBRARY, Port, family_of, rope

INDEX = "model.safetensors.index.json"


def exported(artifact: Artifact, port: Port) -> Path:
    """The checkpoint's folder, made once in the cache. Raises CheckpointError if it cannot be."""
    digest = sha256(artifact.folder / MANIFEST)[:16]
    folder = cache_dir() / LIBRARY / f"{artifact.spec.family}-{digest}"
    with locked(folder, f"writes {folder}"):
        if not folder.exists():
            try:
                with replacing(folder, lambda target: False) as partial:
                    export(artifact, port, partial)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{folder} cannot be written: {error}; LMI_MULTI_CACHE names another place"
                ) from None
    return folder


def export(artifact: Artifact, port: Port, folder: Path) -> None:
    """Write config.json and weights, a file a layer, under Hugging Face's names, into `folder`."""
    config = {"architectures": [port.architecture], **port.config(artifact.spec)}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = artifact.load_rank(0, 1)
    tensors.setdefault("head.weight", tensors["embed.weight"])
    parts: dict[str, list[str]] = {}
    for name in tensors:
        parts.setdefault(_part(name), []).append(name)
    places: dict[str, str] = {}
    for part, names in parts.items():
        file = f"model-{part}.safetensors"
        # One part at a time: those of an artifact of one rank are mapped from its file till then.
        made = {k: v for name in names for k, v in _sources(artifact.spec, name, tensors[name])}
        save_file(made, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _part(name: str) -> str:
    """The file that a tensor goes to: a layer's own, or one for what is not of a layer."""
    stack, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return f"{stack}-{number}" if number.isdigit() else "ends"


def _sources(spec: ModelSpec, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the checkpoint has for a canonical tensor: `Weight` the other way round."""
    family, (module, _, kind) = family_of(spec), name.rpartition(".")
    weight = family.weights(spec)[module]
    if weight.fix is not None:
        tensor = UNDO[weight.fix](tensor, spec)
    split = schema(spec, module).split
    several = len(weight.sources) > 1 and split is not None
    sizes = [n * split.unit for n in split.parts] if several and split else [tensor.shape[0]]
    base = "" if module == "head" else family.base
    for source, part in zip(weight.sources, torch.split(tensor, sizes), strict=True):
        yield f"{base}{source}.{kind}", part.clone(memory_format=torch.contiguous_format)


def _join_heads_qkv(w: Tensor, spec: ModelSpec) -> Tensor:
    tail = w.shape[1:]
    return w.reshape(3, spec.heads, spec.head_dim, *tail).transpose(0, 1).reshape(-1, *tail)


def _interleaved_rope(w: Tensor, spec: ModelSpec) -> Tensor:
    d, tail = rope(spec).dim, w.shape[1:]
    heads = w.reshape(3, spec.heads, spec.head_dim, *tail).clone()
    rotary = heads[:2, :, :d].clone()
    heads[:2, :, 0:d:2], heads[:2, :, 1:d:2] = rotary[:, :, : d // 2], rotary[:, :, d // 2 :]
    return heads.reshape(-1, *tail)


def _two_rows_more(w: Tensor, spec: ModelSpec) -> Tensor:
    return torch.cat((w.new_zeros(2, *w.shape[1:]), w))


UNDO: dict[Fix, Fix] = {
    layouts.transpose: layouts.transpose,
    layouts.split_heads_qkv: _join_heads_qkv,
    layouts.half_split_rope: _interleaved_rope,
    layouts.drop_two_rows: _two_rows_more,
}
