"""Matches a checkpoint's tensors to the canonical ones, and checks all shapes, without data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmi_multi.checkpoint.files import listed
from lmi_multi.checkpoint.header import TensorInfo
from lmi_multi.checkpoint.layout import DtypeName
from lmi_multi.checkpoint.reader import Reader
from lmi_multi.errors import CheckpointError, UnsupportedModelError
from lmi_multi.models.config import Config
from lmi_multi.models.family import Family, Fix, Weight
from lmi_multi.models.registry import family_of
from lmi_multi.models.schema import schema
from lmi_multi.models.spec import ModelSpec

# Tables that are looked up, never multiplied with: a bias beside them means another network.
TABLES = ("embed", "positions", "segments", "relative")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_COMPARE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Entry:
    """One canonical tensor: `sources` concatenated along dim 0, then `fix`; `shape` results."""

    name: str
    sources: tuple[str, ...]
    fix: Fix | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Everything known about a checkpoint before its data is read.

    `dtype` is the one that most bytes of the used tensors have; `ignored` are source tensors that
    the family declares useless.
    """

    architecture: str
    family: Family
    spec: ModelSpec
    dtype: DtypeName
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...]

    @property
    def tensors(self) -> list[str]:
        """The canonical names, in the order in which artifacts store them."""
        return [entry.name for entry in self.entries]


def make_plan(folder: Path, reader: Reader, compare: bool = True) -> Plan:
    """Match the checkpoint in `folder` with its family's table.

    Only a head that might be a copy of the embedding has its data read; without `compare` nothing
    has, and such a head is a copy where config.json says so. Raises CheckpointError
    (missing, left over, misshapen or inconsistent tensors) or UnsupportedModelError.
    """
    config = reader.config()
    architecture = config.architecture
    family = family_of(architecture)
    if config.fields.get("quantization_config"):
        raise UnsupportedModelError(
            "config.json: quantization_config is set; convert the unquantized checkpoint instead"
        )
    spec = family.spec(config)
    count = spec.encoder_layers + spec.decoder_layers
    if count > len(reader.tensors):  # before a table of so many layers is built
        raise CheckpointError(
            f"config.json declares {count} layers, but {folder} holds {len(reader.tensors)} tensors"
        )
    table = family.weights(spec)
    names = _source_names(family, reader.tensors)
    _apply_aliases(family, table, names)
    entries = _match(table, names, reader.tensors, spec)
    _check_uniform(entries)
    _check_head(config, entries, table)
    ignored = _check_leftover(folder, family, names, entries)
    told = config.fields.get("tie_word_embeddings") is True
    if _tied(spec, entries, reader if compare else None, told):
        entries = [entry for entry in entries if entry.name != "head.weight"]
    dtype = dominant(reader.tensors[s] for entry in entries for s in entry.sources)
    return Plan(architecture, family, spec, dtype, tuple(entries), tuple(ignored))


def _source_names(family: Family, tensors: Iterable[str]) -> dict[str, str]:
    """Name in the family's table -> name in the checkpoint."""
    names: dict[str, str] = {}
    for raw in tensors:
        name = raw.removeprefix(family.base)
        for old, new in family.renames:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name in names:
            raise CheckpointError(
                f"tensors {names[name]!r} and {raw!r} both mean {name!r}, expected one of them"
            )
        names[name] = raw
    return names


def _apply_aliases(family: Family, table: Mapping[str, Weight], names: dict[str, str]) -> None:
    """Give a missing module the tensor that was saved under another of its names."""
    for module, others in family.aliases:
        if f"{module}.weight" in names:
            continue
        for other in others:
            if f"{other}.weight" in names:
                names[f"{module}.weight"] = names[f"{other}.weight"]
                break


def _match(
    table: Mapping[str, Weight],
    names: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    spec: ModelSpec,
) -> list[Entry]:
    """One entry for each canonical tensor that the checkpoint has; shapes are checked."""
    entries = []
    missing: list[str] = []
    for module, weight in table.items():
        absent = [name for name in _names(module, weight, "weight") if name not in names]
        for part in ("weight", "bias"):
            wanted = _names(module, weight, part)
            present = [name for name in wanted if name in names]
            if not present and (part == "bias" or weight.optional):
                continue
            if len(present) < len(wanted) or absent:
                missing += [name for name in wanted if name not in names] or absent
                continue
            sources = tuple(names[name] for name in wanted)
            entries.append(_entry(module, part, sources, weight.fix, infos, spec))
    if missing:
        raise CheckpointError(f"the checkpoint lacks {listed(missing)}")
    return entries


def _names(module: str, weight: Weight, part: str) -> list[str]:
    """The names in the family's table of a module's weight or bias; tables have no bias."""
    if part == "bias" and module.rsplit(".", 1)[-1] in TABLES:
        return []
    return [f"{source}.{part}" for source in weight.sources]


def _entry(
    module: str,
    part: str,
    sources: tuple[str, ...],
    fix: Fix | None,
    infos: Mapping[str, TensorInfo],
    spec: ModelSpec,
) -> Entry:
    for name in sources:
        if infos[name].dtype not in FLOATS:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            actual = str(infos[name].dtype).removeprefix("torch.")
            raise CheckpointError(f"tensor {name!r} has dtype {actual}, expected one of {allowed}")
    expected = schema(spec, module) if part == "weight" else schema(spec, module).bias()
    shapes = " + ".join(str(list(infos[name].shape)) for name in sources)
    where = f"{' + '.join(sources)} with shape {shapes}"
    try:
        result = fuse([torch.empty(infos[n].shape, device="meta") for n in sources], fix, spec)
    except (RuntimeError, IndexError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{where} cannot become {module}.{part}: {reason}") from None
    if tuple(result.shape) != expected.shape:
        raise CheckpointError(
            f"{where} gives {module}.{part} the shape {list(result.shape)}, "
            f"expected {list(expected.shape)} by config.json"
        )
    return Entry(f"{module}.{part}", sources, fix, expected.shape)


def fuse(parts: list[Tensor], fix: Fix | None, spec: ModelSpec) -> Tensor:
    """Concatenate `parts` along dim 0 and fix the layout. Works on meta tensors too."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return fix(whole, spec) if fix else whole


def _check_uniform(entries: Iterable[Entry]) -> None:
    """A layer's bias or optional module is in all layers of a stack, or in none."""
    layers: dict[str, set[str]] = {}
    groups: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        stack, _, rest = entry.name.partition(".")
        layer, _, tensor = rest.partition(".")
        if layer.isdigit():
            layers.setdefault(stack, set()).add(layer)
            groups.setdefault((stack, tensor), set()).add(layer)
    for (stack, tensor), present in groups.items():
        absent = sorted(layers[stack] - present, key=int)
        if absent and not tensor.startswith("relative."):
            raise CheckpointError(
                f"{tensor} is in {stack} layers {listed(sorted(present, key=int))} "
                f"but not in {listed(absent)}, expected it in all or none"
            )


def _check_head(config: Config, entries: Iterable[Entry], table: Mapping[str, Weight]) -> None:
    """A model that says it has a head of its own must bring it; bare base models need none."""
    name = config.architecture
    bare = name.endswith("Model") and not name.endswith("LMHeadModel")
    if "head" not in table or bare or config.fields.get("tie_word_embeddings") is not False:
        return
    if all(entry.name != "head.weight" for entry in entries):
        raise CheckpointError(
            f"the checkpoint lacks {table['head'].sources[0]}.weight, "
            "expected it because config.json says that tie_word_embeddings is false"
        )


def _check_leftover(
    folder: Path, family: Family, names: Mapping[str, str], entries: Iterable[Entry]
) -> list[str]:
    """The source tensors that are ignored by name; any other that is unused is an error."""
    used = {source for entry in entries for source in entry.sources}
    rest = {name: raw for name, raw in names.items() if raw not in used}
    patterns = [re.compile(pattern) for pattern in family.ignored]
    ignored = {n: raw for n, raw in rest.items() if any(p.fullmatch(n) for p in patterns)}
    leftover = sorted(raw for name, raw in rest.items() if name not in ignored)
    if leftover:
        raise CheckpointError(
            f"{folder} holds tensors that family {family.name} does not use: {listed(leftover)}"
        )
    return sorted(ignored.values())


def _tied(spec: ModelSpec, entries: list[Entry], reader: Reader | None, told: bool) -> bool:
    """Whether the head is a copy of the embedding, so that one of them suffices.

    Without a reader, whether it is `told` to be.
    """
    by_name = {entry.name: entry for entry in entries}
    head, embed = by_name.get("head.weight"), by_name["embed.weight"]
    if head is None or "head.bias" in by_name or head.fix or embed.fix:
        return False
    (left,), (right,) = head.sources, embed.sources
    if left == right or reader is None:
        return told or left == right
    info = reader.tensors[left]
    if info.dtype != reader.tensors[right].dtype:
        return False
    rows = info.shape[0]
    step = max(1, _COMPARE_BYTES * rows // max(info.nbytes, 1))
    return all(
        torch.equal(
            reader.read(left, start, min(start + step, rows)),
            reader.read(right, start, min(start + step, rows)),
        )
        for start in range(0, rows, step)
    )


def dominant(infos: Iterable[TensorInfo]) -> DtypeName:
    """The dtype that most bytes have, in the names of this package."""
    sizes: dict[DtypeName, int] = {"fp32": 0, "fp16": 0, "bf16": 0}
    names: dict[torch.dtype, DtypeName] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    for info in infos:
        sizes[names.get(info.dtype, "fp32")] += info.nbytes
    return max(sizes, key=lambda name: sizes[name])
