"""Whether a model fits the GPUs of a machine, how large its cache is, and what would fit if not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from lmi_multi.backends.base import Limits
from lmi_multi.backends.limits import block_bytes, plan_limits
from lmi_multi.backends.memory import DEFAULT_BATCH, MEMORY_SHARE, Device
from lmi_multi.checkpoint.files import gib
from lmi_multi.checkpoint.layout import DTYPES, DtypeName, QuantizeName
from lmi_multi.errors import CapacityError
from lmi_multi.fit import Network, report
from lmi_multi.instances import INSTANCES
from lmi_multi.models.schema import valid_degrees

_AMPLE = 2**60  # bytes of a cache that leaves every limit as it was asked for


@dataclass(frozen=True)
class Sizes:
    """What a model was planned with: its limits, and the bytes of each rank."""

    limits: Limits
    weights: int
    workspace: int
    cache: int

    def compared(self, taken: int) -> str:
        """`taken` bytes of a GPU, measured after loading, beside the plan, as a line for people."""
        beside = taken - self.weights - self.cache
        return (
            f"weights {gib(self.weights)}, cache {gib(self.cache)}, and beside them {gib(beside)} "
            f"after loading, of the {gib(self.workspace)} that were left for steps and graphs"
        )


def sizes_on(
    network: Network,
    devices: Sequence[Device],
    degree: int,
    max_batch: int | None,
    max_tokens: int | None,
    memory_share: float | None,
) -> Sizes:
    """The sizes of `network` over the first `degree` of `devices`; None as in `Backend.load`.

    Raises CapacityError that says how many GiB are missing and what would fit, OptionError for
    `max_batch` or `max_tokens` that cannot be.
    """
    asked = _Asked(max_batch, max_tokens, memory_share or MEMORY_SHARE)
    found = _plan(network, devices, degree, asked)
    if isinstance(found, Sizes):
        return found
    raise CapacityError(
        f"{network.source} does not fit at tensor_parallel={degree}: {found}; "
        f"{_advice(network, devices, degree, asked)}"
    )


@dataclass(frozen=True)
class _Asked:
    max_batch: int | None
    max_tokens: int | None
    share: float


def _plan(network: Network, devices: Sequence[Device], degree: int, asked: _Asked) -> Sizes | str:
    """The sizes, or why there are none."""
    ample = _limits(network, degree, _AMPLE, asked)
    weights = network.weight_bytes(network.dtype, network.quantize, degree)
    workspace = network.workspace_bytes(
        network.dtype, network.quantize, degree, ample.max_batch, ample.max_tokens
    )
    least = min(devices[:degree], key=lambda device: device.budget(asked.share))
    room = least.budget(asked.share) - weights - workspace
    try:
        if room >= 0:
            limits = _limits(network, degree, room, asked)
            return Sizes(limits, weights, workspace, _cache(network, degree, limits))
        fault = f"{gib(-room)} are missing"
    except CapacityError as error:
        fault = str(error)
    return (
        f"of each GPU weights need {gib(weights)} and steps {gib(workspace)}, and {least.name} has "
        f"{gib(least.free)} of {gib(least.total)} free, of which memory_share={asked.share:g} "
        f"allows {gib(least.budget(asked.share))}: {fault}"
    )


def _cache(network: Network, degree: int, limits: Limits) -> int:
    item_bytes = DTYPES[network.dtype].itemsize
    return limits.blocks * block_bytes(network.spec, item_bytes, degree, limits.block_size)


def _limits(network: Network, degree: int, memory: int, asked: _Asked) -> Limits:
    return plan_limits(
        network.spec,
        item_bytes=DTYPES[network.dtype].itemsize,
        ranks=degree,
        memory=memory,
        max_batch=asked.max_batch,
        max_tokens=asked.max_tokens,
        default_batch=DEFAULT_BATCH,
    )


def _advice(network: Network, devices: Sequence[Device], degree: int, asked: _Asked) -> str:
    """What would fit these GPUs with the fewest changes, or else the smallest instance."""
    ways = [
        way
        for dtype in _narrower(network.dtype)
        for quantize in _smaller(network.quantize)
        if (way := _way(network, dtype, quantize, devices, degree, asked))
    ]
    fewest = [way for way in ways if not any(other < way for other in ways)]
    if fewest:
        each = (", ".join(f"{n}={v!r}" for n, v in sorted(way)) for way in fewest)
        return f"what would fit: {'; or '.join(each)}"
    gpus = [instance for instance in INSTANCES if instance.backend == "cuda"]
    other = report(network.convertible(), gpus, asked.max_tokens, asked.share).smallest
    return next(
        (
            f"nothing would fit here; {o.instance} takes it with dtype={o.dtype!r}, "
            f"quantize={o.quantize!r}, tensor_parallel={o.tensor_parallel}"
            for o in other
            if (o.dtype, o.quantize) == (network.dtype, network.quantize)
        ),
        "nothing would fit here, nor any instance in this format",
    )


def _narrower(dtype: DtypeName) -> tuple[DtypeName, ...]:
    """The type itself, and what may stand in for it."""
    return ("fp32", "bf16") if dtype == "fp32" else (dtype,)


def _smaller(quantize: QuantizeName | None) -> tuple[QuantizeName | None, ...]:
    return (None, *get_args(QuantizeName)) if quantize is None else (quantize,)


def _way(
    network: Network,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    devices: Sequence[Device],
    degree: int,
    asked: _Asked,
) -> frozenset[tuple[str, object]] | None:
    """The settings to change for this format, at the least degree from `degree` on that fits."""
    other = replace(network, dtype=dtype, quantize=quantize)
    for more in valid_degrees(network.spec, len(devices)):
        if more >= degree and isinstance(_plan(other, devices, more, asked), Sizes):
            wanted = {"dtype": dtype, "quantize": quantize, "tensor_parallel": more}
            given = {
                "dtype": network.dtype,
                "quantize": network.quantize,
                "tensor_parallel": degree,
            }
            return frozenset(wanted.items() - given.items())
    return None
