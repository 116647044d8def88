"""The graphs that a model would have on an instance, counted without compiling any."""

from __future__ import annotations

from lmi_multi.backends.ahead_of_time import Count, GraphCount, GraphPlan, Progress
from lmi_multi.backends.base import Limits
from lmi_multi.instances import Instance
from lmi_multi.network import Network

from . import runtimes
from .buckets import Buckets
from .loading import buckets_of, open_module
from .lower import Lowering, memory_fault
from .sizing import core_bytes


def plan_graphs(
    network: Network,
    instance: Instance,
    degree: int,
    limits: Limits,
    progress: Progress | None = None,
) -> GraphPlan:
    """See `AheadOfTime.plan`. Instructions are counted where torch-xla can trace the network."""
    buckets = buckets_of(network, limits)
    needed = core_bytes(network, degree, limits)
    uncounted = _fault(needed["weights"] + needed["cache"])
    if uncounted is None:
        graphs = _count(network, degree, limits, buckets, progress)
    else:
        graphs = [GraphCount(name=trace.tag, instructions=None) for trace in buckets.traces()]
    return GraphPlan(
        instance=instance.name,
        tensor_parallel=degree,
        max_batch=limits.max_batch,
        max_tokens=limits.max_tokens,
        core_bytes=needed,
        device_bytes=instance.device_bytes,
        buckets=buckets.ladders,
        graphs=graphs,
        uncounted=uncounted,
    )


def _count(
    network: Network, degree: int, limits: Limits, buckets: Buckets, progress: Progress | None
) -> list[GraphCount]:
    module = open_module(network, degree, limits)
    lowering = Lowering(module, module.state_names, degree)
    traces, found = list(buckets.traces()), []
    for done, trace in enumerate(traces, 1):
        graph = lowering.lower(trace)
        found.append(GraphCount(name=trace.tag, instructions=graph.instructions))
        if progress is not None:
            progress(Count(len(traces), done), trace.tag)
    return found


def _fault(needed: int) -> str | None:
    """Why nothing can be traced here; None if it can. `needed` are the bytes of one core."""
    if fault := runtimes.emulator_fault():
        return fault[0].replace("the emulator", "tracing")
    return memory_fault(needed)
