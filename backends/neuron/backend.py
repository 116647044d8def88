"""Inferentia and Trainium, whose cores have only been emulated: see docs/neuron.md."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from lmi_multi.backends.ahead_of_time import Compilation, GraphPlan, Progress
from lmi_multi.backends.base import Availability, Executor
from lmi_multi.backends.limits import check_sizes
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import BackendError, CapacityError, OptionError
from lmi_multi.fit import Network, estimate
from lmi_multi.instances import INSTANCES, REFUSED, Instance
from lmi_multi.models.schema import check_degree
from lmi_multi.models.spec import ModelSpec

from . import devices, environment, instances, runtimes, sdk, sizing
from .environment import CORES, INSTANCE
from .loading import check_place, open_cache, open_executor, open_graphs
from .planning import plan_graphs
from .runtimes import VARIABLE as RUNTIME

EMULATED = "emulated NeuronCores"
CACHE_SHARE = 0.25  # of the memory that the weights leave: a step holds the cache twice


class NeuronBackend:
    """`lmi_multi.backends.base.Backend` for NeuronCores, which no test has had yet, or emulated."""

    name = "neuron"

    def probe(self) -> Availability:
        """What is here, or what stands in the way: of the emulator where that is asked for."""
        try:
            name = runtimes.asked()
        except OptionError as error:
            return _unavailable(str(error), f"unset {RUNTIME}")
        if name == "emulator":
            if missing := runtimes.emulator_fault():
                return _unavailable(*missing)
            return Availability("neuron", True, "emulated on the CPU", devices=(EMULATED,))
        host = devices.look()
        if fault := environment.fault(host) or runtimes.fault(name):
            return _unavailable(*fault, host)
        try:
            cores = _cores(host, _instance())
        except OptionError as error:
            return _unavailable(str(error), f"correct {INSTANCE}, or unset it", host)
        by = f"{runtimes.choose()} on SDK 2.{sdk.installed().release}"
        return Availability("neuron", True, f"{cores}, by {by}", devices=host.devices)

    def check_load(
        self, *, tensor_parallel: int, pipeline_parallel: int, quantize: str | None
    ) -> None:
        """See `Backend.check_load`: the degrees are the instance's, where that is known."""
        _check_stages(pipeline_parallel)
        _check_quantize(quantize)
        name, instance = runtimes.choose(), _instance()
        if instance is not None:
            instances.check(None, instance, tensor_parallel)
            if name == runtimes.LIBRARY:
                _check_library(instance, quantize)

    def load(
        self,
        artifact: Artifact,
        *,
        tensor_parallel: int,
        pipeline_parallel: int = 1,
        max_batch: int | None,
        max_tokens: int | None,
        memory_share: float | None = None,
    ) -> Executor:
        """See `Backend.load`. Raises BackendError for what a runtime cannot carry."""
        _check_stages(pipeline_parallel)
        if memory_share is not None:
            raise OptionError(
                f"memory_share is {memory_share!r}, must be None on NeuronCores, whose memory the "
                "compiled graphs divide"
            )
        network = Network.of(artifact, str(artifact.folder))
        _check_quantize(network.quantize)
        name, instance = runtimes.choose(), _instance()
        if name == "emulator" and instance is None:
            memory = _free_memory(artifact, tensor_parallel)
            limits = sizing.plan(
                artifact.spec, artifact.dtype, tensor_parallel, memory, max_batch, max_tokens
            )
        elif instance is None:
            raise BackendError(
                f"this machine does not tell its instance type; set {INSTANCE}, as inf2.xlarge"
            )
        elif name == runtimes.LIBRARY:
            from . import transformers_neuronx

            return transformers_neuronx.open_executor(
                artifact,
                tensor_parallel,
                memory=_library_memory(network, instance, tensor_parallel, max_tokens),
                max_batch=max_batch,
                max_tokens=max_tokens,
            )
        else:
            limits = sizing.limits_on(network, instance, tensor_parallel, max_batch, max_tokens)
        _check(artifact.spec, tensor_parallel)
        return open_executor(
            artifact,
            tensor_parallel,
            limits,
            runtimes.open_runtime(name, None),
            open_cache(network, tensor_parallel, limits),
        )

    def plan(
        self,
        network: Network,
        *,
        instance: str,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
        progress: Progress | None = None,
    ) -> GraphPlan:
        """See `AheadOfTime.plan`."""
        on = instances.find(instance)
        _check_quantize(network.quantize)
        limits = sizing.limits_on(network, on, tensor_parallel, max_batch, max_tokens)
        _check(network.spec, tensor_parallel)
        return plan_graphs(network, on, tensor_parallel, limits, progress)

    def check(
        self,
        *,
        instance: str,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
        quantize: str | None = None,
        cache: str | Path | None = None,
        jobs: int | None = None,
        network: Network | None = None,
    ) -> None:
        """See `AheadOfTime.check`."""
        on = instances.find(instance)
        instances.check(None, on, tensor_parallel)
        _check_quantize(quantize)
        check_sizes(max_batch, max_tokens)
        _check_jobs(jobs)
        check_place(cache)
        if runtimes.choose() == runtimes.LIBRARY:
            _check_library(on, quantize)
        if network is not None:
            _check_quantize(network.quantize)
            sizing.limits_on(network, on, tensor_parallel, max_batch, max_tokens)
            _check(network.spec, tensor_parallel)

    def compile(
        self,
        artifact: Artifact,
        *,
        instance: str,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
        cache: str | Path | None = None,
        jobs: int | None = None,
        progress: Progress | None = None,
    ) -> Compilation:
        """See `AheadOfTime.compile`."""
        on = instances.find(instance)
        _check_jobs(jobs)
        network = Network.of(artifact, str(artifact.folder))
        _check_quantize(network.quantize)
        if runtimes.choose() == runtimes.LIBRARY:
            from . import transformers_neuronx

            environment.compile_for(on.name)
            return transformers_neuronx.compile_ahead_of_time(
                artifact,
                tensor_parallel,
                memory=_library_memory(network, on, tensor_parallel, max_tokens),
                max_batch=max_batch,
                max_tokens=max_tokens,
                where=cache,
                jobs=jobs,
            )
        limits = sizing.limits_on(network, on, tensor_parallel, max_batch, max_tokens)
        _check(artifact.spec, tensor_parallel)
        place = open_cache(network, tensor_parallel, limits, cache)
        runtime = runtimes.open_runtime(runtimes.choose(), on)
        graphs = open_graphs(network, tensor_parallel, limits, runtime, place, must_keep=True)
        graphs.make_all(jobs or os.cpu_count() or 1, progress)
        return Compilation(graphs.count, str(place))


def _instance() -> Instance | None:
    """The instance that is asked for or that this machine is; None on any other machine."""
    if name := os.environ.get(INSTANCE):
        return instances.find(name)
    here = devices.instance_type()
    return next((i for i in INSTANCES if i.backend == "neuron" and i.name == here), None)


def _cores(host: devices.Host, instance: Instance | None) -> str:
    """The cores of a host that has some, for people."""
    named = environment.named_cores(host)
    usable = f"{len(host.free)} free" if named is None else f"{len(named)} named by {CORES}"
    cores = f"{len(host.cores)} NeuronCores of {host.cores[0].memory / 2**30:.0f} GiB"
    if instance is None:
        return f"{cores}, {usable}, of no known instance type: set {INSTANCE}"
    degrees = ", ".join(map(str, instance.degrees))
    return f"{instance.name}: {cores}, {usable}, tensor_parallel {degrees}"


def _library_memory(
    network: Network, instance: Instance, degree: int, max_tokens: int | None
) -> int:
    """Bytes of each core for the cache of transformers-neuronx. Raises as `sizing.limits_on`."""
    _check_library(instance, network.quantize)
    sizing.limits_on(network, instance, degree, 1, max_tokens)  # says what does not fit
    option = estimate(network, instance, network.dtype, network.quantize, degree, max_tokens)
    return option.cache_bytes


def _check_library(instance: Instance, quantize: str | None) -> None:
    if instance.name.startswith("trn2"):
        raise BackendError(f"{runtimes.LIBRARY} runs on inf2 and trn1, not on {instance.name}")
    if quantize is not None:
        raise BackendError(f"quantize is {quantize!r}, must be None with {runtimes.LIBRARY}")


def _check(spec: ModelSpec, degree: int) -> None:
    if spec.length_dependent:
        raise BackendError(
            "rope scaling 'dynamic' depends on a text's length, which a static graph does not "
            "know; the neuron backend runs linear, llama3, yarn or none"
        )
    check_degree(spec, degree)


def _check_stages(count: int) -> None:
    if count != 1:
        raise BackendError(
            f"pipeline_parallel is {count}; allowed on NeuronCores: 1, with a higher "
            "tensor_parallel"
        )


def _check_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise OptionError(f"jobs is {jobs}, must be at least 1")


def _check_quantize(quantize: str | None) -> None:
    refused = {name: why for (backend, name), why in REFUSED.items() if backend == "neuron"}
    if quantize in refused:
        raise BackendError(f"quantize is {quantize!r}, must be None or int8: {refused[quantize]}")


def _free_memory(artifact: Artifact, degree: int) -> int:
    """Bytes that each emulated core may spend on its cache."""
    weights = sum(artifact.tensor_bytes(rank, degree) for rank in range(degree))
    free = psutil.virtual_memory().available
    if 2 * weights > free:  # the tracer has a copy
        raise CapacityError(
            f"the emulator needs {2 * weights / 2**30:.2f} GiB of memory for weights, but "
            f"{free / 2**30:.2f} GiB are free"
        )
    return int((free - 2 * weights) * CACHE_SHARE / degree)


def _unavailable(reason: str, remedy: str, host: devices.Host | None = None) -> Availability:
    return Availability("neuron", False, reason, remedy, () if host is None else host.devices)
