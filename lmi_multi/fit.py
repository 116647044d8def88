"""Whether a model fits an instance: from shapes alone, by the arithmetic that loading uses.

These are estimates. What is exact: the bytes of weights that a rank holds, and the bytes of a cache
block. What is assumed: `RESERVED` bytes of every device are taken by driver, runtime, libraries and
communication. On a GPU the model takes `MEMORY_SHARE` of the memory, of which the cache gets what
weights and `workspace_bytes` leave; on NeuronCores the cache gets `CACHE_SHARE` of what the weights
leave. While weights load the host holds `BUFFERS` bytes for each GPU, or the weights of all
NeuronCores once, and `HOST_RESERVED` bytes beside them. Nothing of this was measured on the
instances.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, Field, computed_field

from lmi_multi.backends.limits import plan_limits, row_blocks
from lmi_multi.backends.memory import (
    MEMORY_SHARE,
    Device,
    check_share,
)
from lmi_multi.checkpoint.files import gib
from lmi_multi.checkpoint.layout import (
    DtypeName,
    QuantizeName,
    parameters,
)
from lmi_multi.errors import CapacityError
from lmi_multi.instances import GIB, INSTANCES, REFUSED, Instance
from lmi_multi.models.schema import valid_degrees
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.stages import check_stages
from lmi_multi.network import Network

RESERVED = 1 * GIB
HOST_RESERVED = 2 * GIB
CACHE_SHARE = 0.8
BUFFERS = 64 * 2**20  # through which the CUDA backend reads
_ROWS = 2**40  # more than any memory holds: the memory is to be the limit


class Option(BaseModel):
    """One way to load the model on one instance. Bytes are those of one rank, of the pipeline stage
    that has least room for its cache.

    `batch` sequences of `max_tokens` tokens each fit at once (of an encoder-decoder: so many prompt
    and so many generated tokens), or one of `longest` tokens; they are None for an encoder, which
    has no cache. `reason` says why it does not fit.
    """

    dtype: DtypeName
    quantize: QuantizeName | None
    tensor_parallel: int
    pipeline_parallel: int
    weight_bytes: int
    cache_bytes: int
    fits: bool
    reason: str | None
    batch: int | None
    max_tokens: int | None
    longest: int | None


class InstanceFit(BaseModel):
    """All ways to load the model on one instance type; sizes in bytes."""

    name: str
    backend: str
    device: str
    devices: int
    device_bytes: int
    host_bytes: int
    options: list[Option]

    def best(self, dtype: DtypeName, quantize: QuantizeName | None) -> Option | None:
        """The least degree at which the model fits in this format."""
        return next(
            (o for o in self.options if o.fits and (o.dtype, o.quantize) == (dtype, quantize)), None
        )


class Smallest(BaseModel):
    """The smallest instance that takes the model in one format, by memory: prices are not known."""

    instance: str
    dtype: DtypeName
    quantize: QuantizeName | None
    tensor_parallel: int
    pipeline_parallel: int


class Report(BaseModel):
    """What `lmi-multi plan` shows. Instances are ordered by size; all figures are estimates.

    `dtype` and `quantize` are the source's own. `smallest` has one entry for each format that fits
    an instance.
    """

    source: str
    family: str
    kind: str
    parameters: int
    dtype: DtypeName
    quantize: QuantizeName | None
    degrees: list[int]
    smallest: list[Smallest]
    instances: list[InstanceFit]
    memory_share: float = Field(exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def assumptions(self) -> dict[str, float]:
        """What the estimates assume beside the shapes; bytes, and a share."""
        return {
            "reserved_bytes_per_device": RESERVED,
            "reserved_bytes_of_host": HOST_RESERVED,
            "memory_share_of_a_gpu": self.memory_share,
            "cache_share_of_the_rest_on_neuron": CACHE_SHARE,
        }


def report(
    network: Network,
    instances: Iterable[Instance] = INSTANCES,
    max_tokens: int | None = None,
    memory_share: float | None = None,
    pipeline_parallel: int = 1,
) -> Report:
    """Estimate `network` on every instance, over so many pipeline stages, which only GPUs can be;
    `max_tokens` and `memory_share` as in `load` (None: the defaults).

    Raises OptionError for a `max_tokens` beyond the model's positions, for a `memory_share` that is
    none, and for more stages than there are layers.
    """
    spec = network.spec
    check_share(memory_share)
    check_stages(spec, pipeline_parallel)
    ordered = sorted(instances, key=lambda i: i.size)
    fits = [_on(network, i, max_tokens, memory_share, pipeline_parallel) for i in ordered]
    return Report(
        source=network.source,
        family=spec.family,
        kind=spec.kind,
        parameters=parameters(spec, network.tensors),
        dtype=network.dtype,
        quantize=network.quantize,
        degrees=valid_degrees(spec),
        smallest=_smallest(network, fits),
        instances=fits,
        memory_share=memory_share or MEMORY_SHARE,
    )


def _smallest(network: Network, fits: list[InstanceFit]) -> list[Smallest]:
    result = []
    for dtype, quantize in network.formats():
        for fit in fits:
            if option := fit.best(dtype, quantize):
                result.append(
                    Smallest(
                        instance=fit.name,
                        dtype=dtype,
                        quantize=quantize,
                        tensor_parallel=option.tensor_parallel,
                        pipeline_parallel=option.pipeline_parallel,
                    )
                )
                break
    return result


def _on(
    network: Network,
    instance: Instance,
    max_tokens: int | None,
    memory_share: float | None,
    stages: int,
) -> InstanceFit:
    most = instance.devices // stages if stages == 1 or instance.backend == "cuda" else 0
    possible = set(valid_degrees(network.spec, most))
    degrees = [degree for degree in instance.degrees if degree in possible]
    return InstanceFit(
        name=instance.name,
        backend=instance.backend,
        device=instance.device,
        devices=instance.devices,
        device_bytes=instance.device_bytes,
        host_bytes=instance.host_bytes,
        options=[
            estimate(network, instance, dtype, quantize, degree, max_tokens, memory_share, stages)
            for dtype, quantize in network.formats()
            for degree in degrees
        ],
    )


def estimate(
    network: Network,
    instance: Instance,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    degree: int,
    max_tokens: int | None = None,
    memory_share: float | None = None,
    stages: int = 1,
) -> Option:
    """One format at one degree, over so many pipeline stages, on one instance; `memory_share` is
    for GPUs."""
    free = instance.device_bytes - RESERVED
    needs = network.needs(dtype, quantize, degree, stages, None, max_tokens)
    if instance.backend == "cuda":
        device = Device(instance.device, instance.device_bytes, free)
        budget = device.budget(memory_share or MEMORY_SHARE)
        need = min(needs, key=lambda need: need.room(budget))
        cache = left = need.left(budget)
        beside = " and what a step needs beside them"
    else:
        [need] = needs
        left = free - need.weights
        cache, beside = int(left * CACHE_SHARE), ""
    option = Option(
        dtype=dtype,
        quantize=quantize,
        tensor_parallel=degree,
        pipeline_parallel=stages,
        weight_bytes=need.weights,
        cache_bytes=max(0, cache),
        fits=False,
        reason=None,
        batch=None,
        max_tokens=None,
        longest=None,
    )
    loading = BUFFERS if instance.backend == "cuda" else need.weights
    host = HOST_RESERVED + degree * stages * loading
    if quantize and (refusal := REFUSED.get((instance.backend, quantize))):
        option.reason = refusal
    elif left < 0:
        option.reason = f"{gib(-left)} of device memory are missing for the weights{beside}"
    elif host > instance.host_bytes:
        option.reason = f"{gib(host - instance.host_bytes)} of host memory are missing to load it"
    else:
        _fill(option, network.spec, need.layers, max_tokens)
    return option


def _fill(option: Option, spec: ModelSpec, layers: int, max_tokens: int | None) -> None:
    """What fits into the cache; nothing where there is none to fill."""
    try:
        limits = plan_limits(
            spec,
            item_bytes=4 if option.dtype == "fp32" else 2,
            ranks=option.tensor_parallel,
            memory=option.cache_bytes,
            layers=layers,
            max_batch=_ROWS,
            max_tokens=max_tokens,
        )
    except CapacityError as error:
        option.reason = str(error)
        return
    option.fits = True
    if spec.kind == "encoder":
        return
    per_row = row_blocks(spec, limits.max_tokens, limits.max_tokens, limits.block_size)
    stacks = row_blocks(spec, 1, 1, limits.block_size)  # an encoder's prompt is cached too
    longest = limits.blocks // stacks * limits.block_size
    option.batch, option.max_tokens = limits.blocks // per_row, limits.max_tokens
    option.longest = min(longest, spec.max_positions or longest)
