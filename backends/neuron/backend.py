"""Inferentia and Trainium: emulated so far, see docs/neuron.md."""

from __future__ import annotations

import os
from importlib.util import find_spec

import psutil

from lmi_multi.backends.base import Availability, Executor
from lmi_multi.backends.limits import plan_limits
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import BackendError, CapacityError
from lmi_multi.models.schema import check_degree
from lmi_multi.models.spec import ModelSpec

from . import devices, instances
from .runtimes import VARIABLE as RUNTIME
from .runtimes import open_runtime

INSTANCE = "LMI_MULTI_NEURON_INSTANCE"
CACHE_SHARE = 0.25  # of the memory that the weights leave: a step holds the cache twice
NEEDED = ("torch_xla", "jax", "jaxlib")


class NeuronBackend:
    """`lmi_multi.backends.base.Backend` for NeuronCores, which only the emulator runs so far."""

    name = "neuron"

    def probe(self) -> Availability:
        """Available as an emulator where that is asked for; tells a host with cores from one
        without, and what is missing there."""
        runtime = os.environ.get(RUNTIME, "")
        if runtime == "emulator":
            return _probe_emulator()
        if runtime:
            return _unavailable(
                f"{RUNTIME} is {runtime!r}", f"must be emulator, or unset {RUNTIME}"
            )
        host = devices.look()
        fault = devices.fault(host, devices.sdk_version()) or (
            f"{len(host.cores)} NeuronCores found, but this version runs on Neuron only emulated",
            "use backend='cpu' or 'cuda'",
        )
        return _unavailable(*fault, host)

    def load(
        self,
        artifact: Artifact,
        *,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
    ) -> Executor:
        """See `Backend.load`. Raises BackendError for what static graphs cannot carry."""
        if os.environ.get(RUNTIME) != "emulator":
            raise BackendError(f"this version runs on Neuron only emulated; set {RUNTIME}=emulator")
        spec, degree = artifact.spec, tensor_parallel
        _check(spec, degree)
        limits = plan_limits(
            spec,
            item_bytes=4 if artifact.dtype == "fp32" else 2,
            ranks=degree,
            memory=_cache_memory(artifact, degree),
            max_batch=max_batch,
            max_tokens=max_tokens,
            max_step_tokens=512,
        )
        from .loading import open_executor

        return open_executor(artifact, degree, limits, open_runtime("emulator", None))


def _check(spec: ModelSpec, degree: int) -> None:
    if spec.length_dependent:
        raise BackendError(
            "rope scaling 'dynamic' depends on a text's length, which a static graph does not "
            "know; the neuron backend runs linear, llama3, yarn or none"
        )
    name = os.environ.get(INSTANCE)
    if name:
        instances.check(spec, instances.find(name), degree)
    check_degree(spec, degree)


def _cache_memory(artifact: Artifact, degree: int) -> int:
    """Bytes that each emulated core may spend on its cache."""
    weights = sum(artifact.tensor_bytes(rank, degree) for rank in range(degree))
    free = psutil.virtual_memory().available
    if 2 * weights > free:  # the tracer has a copy
        raise CapacityError(
            f"the emulator needs {2 * weights / 2**30:.2f} GiB of memory for weights, but "
            f"{free / 2**30:.2f} GiB are free"
        )
    return int((free - 2 * weights) * CACHE_SHARE / degree)


def _probe_emulator() -> Availability:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return _unavailable(
            f"the emulator needs {', '.join(missing)}",
            f"run `make test-neuron`, which installs them, or unset {RUNTIME}",
        )
    return Availability("neuron", True, "emulated on the CPU", devices=("emulated NeuronCores",))


def _unavailable(reason: str, remedy: str, host: devices.Host | None = None) -> Availability:
    return Availability("neuron", False, reason, remedy, () if host is None else host.devices)
