"""From an artifact to its graphs, and with its weights to an executor."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import torch

from lmi_multi.backends.base import Limits
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.fit import Network
from lmi_multi.models.weights import rank_data

from .buckets import VARIABLE as STEPS
from .buckets import Buckets
from .cache import Cache
from .environment import CACHE
from .executor import NeuronExecutor
from .graphs import Graphs
from .lower import TraceCollectives
from .module import StaticModel, buffer_name
from .places import parse
from .program import Runtime
from .sizing import spare_blocks

logger = logging.getLogger(__name__)

FOLDER = "neuron"


def check_place(where: str | Path | None) -> None:
    """Raise OptionError if `open_cache` would for its place, whatever the network."""
    if place := where or os.environ.get(CACHE):
        parse(place)


def open_cache(
    network: Network, degree: int, limits: Limits, where: str | Path | None = None
) -> Cache:
    """The cache of the network's graphs in `where`, a folder or `s3://BUCKET/PREFIX`; by default
    where the environment says, or else in the artifact's own folder, which `source` then is.

    Models share a place without getting in each other's way: everything that a graph's shapes
    follow from is in the name of an inner folder. Raises what `Cache.at` raises.
    """
    place = where or os.environ.get(CACHE) or Path(network.source) / FOLDER
    spec, tensors = network.spec, sorted(network.tensors)
    model = json.dumps([spec.to_dict(), network.dtype, network.quantize, tensors])
    digest = hashlib.sha256(model.encode()).hexdigest()[:12]
    name = f"{spec.family}-{digest}-"
    sizes = f"tp{degree}-{limits.max_batch}x{limits.max_tokens}"
    return Cache.at(place, name + sizes, name)


def open_module(network: Network, degree: int, limits: Limits) -> StaticModel:
    """Rank 0's module for tracing. Its weights are zeros: they are inputs of a graph."""
    spec = network.spec
    tensors = {t.name: torch.zeros(t.local_shape(degree), dtype=t.dtype) for t in network.stored()}
    tensors |= rank_data(spec, 0, degree)
    blocks = limits.blocks + spare_blocks(spec, limits)
    return StaticModel(spec, tensors, TraceCollectives(degree), blocks, limits.block_size)


def buckets_of(network: Network, limits: Limits) -> Buckets:
    """The ladders of its graphs, with the steps that the environment names."""
    blocks = limits.blocks + spare_blocks(network.spec, limits)
    return Buckets.of(network.spec, limits, blocks).having(os.environ.get(STEPS, ""))


def open_graphs(
    network: Network,
    degree: int,
    limits: Limits,
    runtime: Runtime,
    cache: Cache | None = None,
    must_keep: bool = False,
) -> Graphs:
    """The graphs of the network over `degree` cores; none is made yet."""
    module = open_module(network, degree, limits)
    builder = runtime.builder(module, module.state_names, degree)
    traces = buckets_of(network, limits).traces()
    return Graphs(builder, runtime.toolchain, traces, cache, must_keep)


def open_executor(
    artifact: Artifact,
    degree: int,
    limits: Limits,
    runtime: Runtime,
    cache: Cache | None = None,
) -> NeuronExecutor:
    """The artifact over `degree` cores of `runtime`, with graphs from `cache` if it has them."""
    spec, network = artifact.spec, Network.of(artifact, str(artifact.folder))
    graphs = open_graphs(network, degree, limits, runtime, cache)
    if not runtime.lazy:
        graphs.make_all(os.cpu_count() or 1)
        if compiled := graphs.count.total - graphs.count.hits:
            logger.info("compiled %d of %d graphs", compiled, graphs.count.total)
    program = graphs.assemble()
    shards = (
        artifact.load_rank(rank, degree) | rank_data(spec, rank, degree) for rank in range(degree)
    )
    program.load_weights([{buffer_name(n): t for n, t in shard.items()} for shard in shards])
    device = f"{degree} {runtime.device}"
    return NeuronExecutor(spec, limits, program, buckets_of(network, limits), device)
