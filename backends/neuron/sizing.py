"""Whether a model fits the cores of an instance, and the limits that it then has there.

The arithmetic is that of `lmi_multi.fit`. It knows the instance only by its type, so that graphs
compiled on one machine are those that another one looks for.
"""

from __future__ import annotations

from dataclasses import replace

from lmi_multi.backends.base import Limits
from lmi_multi.backends.limits import block_bytes, plan_limits, row_blocks
from lmi_multi.checkpoint.layout import QuantizeName
from lmi_multi.errors import CapacityError, OptionError
from lmi_multi.fit import RESERVED, estimate
from lmi_multi.instances import INSTANCES, Instance
from lmi_multi.models.schema import valid_degrees
from lmi_multi.models.spec import ModelSpec
from lmi_multi.network import Network

from . import instances

MAX_STEP_TOKENS = 512  # a prompt's slice: larger buckets would only be more graphs


def limits_on(
    network: Network,
    instance: Instance,
    degree: int,
    max_batch: int | None = None,
    max_tokens: int | None = None,
) -> Limits:
    """The limits of `network` over `degree` cores of `instance`; None as in `Backend.load`.

    Raises OptionError that lists the degrees which are valid, and CapacityError that says how many
    bytes are missing and what would fit.
    """
    instances.check(network.spec, instance, degree)
    try:
        return _limits(network, instance, network.quantize, degree, max_batch, max_tokens)
    except CapacityError as error:
        raise CapacityError(
            f"{network.source} does not fit {degree} cores of {instance.name}: {error}; "
            f"{_fitting(network, instance, degree, max_tokens)}"
        ) from None


def _limits(
    network: Network,
    instance: Instance,
    quantize: QuantizeName | None,
    degree: int,
    max_batch: int | None,
    max_tokens: int | None,
) -> Limits:
    option = estimate(network, instance, network.dtype, quantize, degree, max_tokens)
    if option.reason is not None:
        raise CapacityError(option.reason)
    return plan(network.spec, network.dtype, degree, option.cache_bytes, max_batch, max_tokens)


def plan(
    spec: ModelSpec,
    dtype: str,
    degree: int,
    memory: int,
    max_batch: int | None,
    max_tokens: int | None,
) -> Limits:
    """Limits for a cache, spare blocks included, of `memory` bytes a core.

    Raises CapacityError, and OptionError for more rows than could ever run: each of their buckets
    is a graph.
    """
    item_bytes = 4 if dtype == "fp32" else 2
    limits = plan_limits(
        spec,
        item_bytes=item_bytes,
        ranks=degree,
        memory=memory,
        max_batch=max_batch,
        max_tokens=max_tokens,
        max_step_tokens=MAX_STEP_TOKENS,
    )
    block = block_bytes(spec, item_bytes, degree, limits.block_size)
    if not block:
        return limits
    row = row_blocks(spec, limits.max_tokens, limits.max_tokens, limits.block_size)
    room = memory // block - spare_blocks(spec, limits)
    if room < row:
        raise CapacityError(
            f"a row of {limits.max_tokens} tokens, and as much to score one, need "
            f"{(row - room) * block / 2**30:.2f} GiB more of cache"
        )
    blocks = min(limits.blocks, room)
    rows = blocks // row_blocks(spec, 1, 1, limits.block_size)
    if max_batch is not None and max_batch > rows:
        raise OptionError(
            f"max_batch is {max_batch}, must be at most {rows}, as the cache has no more blocks "
            f"of {limits.block_size} tokens"
        )
    return replace(limits, blocks=blocks)


def spare_blocks(spec: ModelSpec, limits: Limits) -> int:
    """Blocks beyond the engine's: room to score one text, and one block for padding."""
    if not spec.decoder_layers:
        return 1
    return row_blocks(spec, limits.max_tokens, limits.max_tokens, limits.block_size) + 1


def core_bytes(network: Network, degree: int, limits: Limits) -> dict[str, int]:
    """Estimated bytes of each core: weights and cache are exact, the rest is assumed."""
    item_bytes = 4 if network.dtype == "fp32" else 2
    block = block_bytes(network.spec, item_bytes, degree, limits.block_size)
    return {
        "weights": network.weight_bytes(network.dtype, network.quantize, degree),
        "cache": block * (limits.blocks + spare_blocks(network.spec, limits)),
        "reserved": RESERVED,
    }


def _fitting(network: Network, instance: Instance, degree: int, max_tokens: int | None) -> str:
    """What would fit: other degrees, int8 weights, or else the smallest other instance."""

    def fits(on: Instance, quantize: QuantizeName | None, n: int) -> bool:
        try:
            _limits(network, on, quantize, n, None, max_tokens)
        except CapacityError:
            return False
        return True

    def degrees(on: Instance) -> list[int]:
        possible = set(valid_degrees(network.spec, on.devices))
        return [n for n in on.degrees if n in possible and fits(on, network.quantize, n)]

    found = []
    if here := [n for n in degrees(instance) if n != degree]:
        found.append(f"tensor_parallel {', '.join(map(str, here))}")
    if network.quantize is None and fits(instance, "int8", degree):
        found.append("int8 weights")
    others = sorted((i for i in INSTANCES if i.backend == "neuron"), key=lambda i: i.size)
    if not found:
        found = [f"{i.name} at tensor_parallel {n[0]}" for i in others if (n := degrees(i))][:1]
    if not found:
        return "no instance with NeuronCores would take it at this max_tokens"
    return f"what would fit: {', or '.join(found)}"
