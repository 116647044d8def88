"""From an artifact to its graphs, and with its weights to an executor."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.models.weights import rank_data

from .buckets import Buckets
from .cache import Cache
from .executor import NeuronExecutor
from .graphs import Graphs
from .lower import TraceCollectives
from .module import StaticModel, buffer_name
from .program import Runtime
from .sizing import spare_blocks

CACHE = "LMI_MULTI_NEURON_CACHE"
FOLDER = "neuron"


def open_cache(
    artifact: Artifact, degree: int, limits: Limits, where: str | Path | None = None
) -> Cache:
    """The cache of the artifact's graphs: in `where`, a folder or `s3://BUCKET/PREFIX`, else where
    the environment says, else in the artifact's own folder.

    Models share a place without getting in each other's way: everything that a graph's shapes
    follow from is in the name of an inner folder. Raises what `Cache.at` raises.
    """
    place = where or os.environ.get(CACHE) or artifact.folder / FOLDER
    manifest = artifact.manifest
    model = json.dumps([manifest.spec, manifest.dtype, manifest.quantize, sorted(manifest.tensors)])
    digest = hashlib.sha256(model.encode()).hexdigest()[:12]
    sizes = f"tp{degree}-{limits.max_batch}x{limits.max_tokens}"
    return Cache.at(place, f"{artifact.spec.family}-{digest}-{sizes}")


def open_graphs(
    artifact: Artifact,
    degree: int,
    limits: Limits,
    runtime: Runtime,
    cache: Cache | None = None,
    must_keep: bool = False,
) -> Graphs:
    """The graphs of the artifact over `degree` cores; no weights are read, none is made yet."""
    blocks = limits.blocks + spare_blocks(artifact.spec, limits)
    tensors = _placeholders(artifact, degree)
    collectives = TraceCollectives(degree)
    module = StaticModel(artifact.spec, tensors, collectives, blocks, limits.block_size)
    builder = runtime.builder(module, module.state_names, degree)
    traces = Buckets.of(artifact.spec, limits, blocks).traces()
    return Graphs(builder, runtime.toolchain, traces, cache, must_keep)


def open_executor(
    artifact: Artifact,
    degree: int,
    limits: Limits,
    runtime: Runtime,
    cache: Cache | None = None,
) -> NeuronExecutor:
    """The artifact over `degree` cores of `runtime`, with graphs from `cache` if it has them."""
    spec = artifact.spec
    graphs = open_graphs(artifact, degree, limits, runtime, cache)
    if not runtime.lazy:
        graphs.make_all(os.cpu_count() or 1)
    program = graphs.assemble()
    shards = (
        artifact.load_rank(rank, degree) | rank_data(spec, rank, degree) for rank in range(degree)
    )
    program.load_weights([{buffer_name(n): t for n, t in shard.items()} for shard in shards])
    buckets = Buckets.of(spec, limits, limits.blocks + spare_blocks(spec, limits))
    return NeuronExecutor(spec, limits, program, buckets, f"{degree} {runtime.device}")


def _placeholders(artifact: Artifact, degree: int) -> dict[str, Tensor]:
    """Rank 0's tensors without their values: weights are inputs of a graph."""
    stored = {t.name: torch.zeros(t.local_shape(degree), dtype=t.dtype) for t in artifact.stored}
    return stored | rank_data(artifact.spec, 0, degree)
