"""`lmi-multi plan`: which instance a model fits, and which graphs it has there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lmi_multi.cli import options
from lmi_multi.cli.console import graph_progress, json_page, note, out, size, table

if TYPE_CHECKING:
    from lmi_multi.backends.ahead_of_time import GraphPlan
    from lmi_multi.fit import InstanceFit, Network, Option, Report, Smallest


def plan(
    source: options.Source,
    instance: Annotated[
        str | None,
        typer.Option(help="One instance type, such as g5.12xlarge, in every detail."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens a sequence, as for generate.")
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(help="With an instance that has NeuronCores: list the graphs for so many."),
    ] = None,
    pipeline_parallel: Annotated[
        int, typer.Option(help="Stages that share the layers, each on GPUs of its own.")
    ] = 1,
    max_batch: Annotated[
        int | None, typer.Option(help="Prompts computed at once, for the graphs.")
    ] = None,
    memory_share: Annotated[
        float | None,
        typer.Option(help="Part of a GPU's memory that the model may take; else 0.9."),
    ] = None,
    json: options.Json = False,
    revision: options.Revision = None,
) -> None:
    """Estimate which AWS instances a model fits, at which dtype and degree; reads no tensors.

    With --tensor-parallel: the graphs that `compile` would make in the model's own dtype, and the
    bytes of each core. Instructions are counted where torch-xla is installed.

    Figures come from shapes. They assume 1 GiB of each device and 2 GiB of the host for everything
    else. On a GPU the model takes 90% of the memory, or --memory-share of it, and the cache gets
    what weights and a step leave; on NeuronCores it gets 80% of what the weights leave.
    """
    from lmi_multi.errors import OptionError
    from lmi_multi.fit import read_network, report
    from lmi_multi.instances import INSTANCES, find

    if tensor_parallel is not None:
        if instance is None:
            raise OptionError("tensor_parallel needs an instance: the one to list graphs for")
        if pipeline_parallel != 1:
            raise OptionError(
                f"pipeline_parallel is {pipeline_parallel}; allowed for the list of graphs: 1"
            )
        _refuse_share(memory_share, "for the list of graphs")
        network = read_network(source, revision)
        _graphs(network, instance, tensor_parallel, max_batch, max_tokens, json)
        return
    if max_batch is not None:
        raise OptionError("max_batch needs tensor_parallel: it is for the list of graphs")
    chosen = INSTANCES if instance is None else (find(instance),)
    if all(one.backend != "cuda" for one in chosen):
        _refuse_share(memory_share, "on NeuronCores")
    network = read_network(source, revision)
    found = report(network, chosen, max_tokens, memory_share, pipeline_parallel)
    if json:
        json_page(found.model_dump(mode="json"))
        return
    out().print(_overview(found) if instance is None else _detail(found, found.instances[0]))
    _closing(found)


def _refuse_share(memory_share: float | None, where: str) -> None:
    from lmi_multi.errors import OptionError

    if memory_share is not None:
        raise OptionError(f"memory_share is {memory_share}; allowed {where}: nothing")


def _graphs(
    network: Network,
    instance: str,
    degree: int,
    max_batch: int | None,
    max_tokens: int | None,
    json: bool,
) -> None:
    from lmi_multi.backends import compiler

    with graph_progress(f"tracing {network.source}") as progress:
        found = compiler().plan(
            network,
            instance=instance,
            tensor_parallel=degree,
            max_batch=max_batch,
            max_tokens=max_tokens,
            progress=progress,
        )
    if json:
        json_page(found.model_dump(mode="json"))
        return
    out().print(_graph_table(network.source, found))
    for name, steps in found.buckets.items():
        note(f"{name}: {', '.join(map(str, steps))}")
    needed = ", ".join(f"{name} {size(count)}" for name, count in found.core_bytes.items())
    total = size(sum(found.core_bytes.values()))
    note(f"a core needs {total} of {size(found.device_bytes)}: {needed}")
    if found.uncounted:
        note(f"instructions are not counted: {found.uncounted}")


def _graph_table(source: str, found: GraphPlan) -> Table:
    title = (
        f"{source} on {found.tensor_parallel} cores of {found.instance}, {found.max_batch:,} "
        f"sequences of {found.max_tokens:,} tokens: {len(found.graphs):,} graphs"
    )
    shown = table("graph", "instructions", title=title)
    for graph in found.graphs:
        count = graph.instructions
        shown.add_row(graph.name, "-" if count is None else f"{count:,}")
    return shown


def _overview(found: Report) -> Table:
    every = [(o.dtype, o.quantize) for i in found.instances for o in i.options]
    # Columns are scarce, and fp8 takes exactly what int8 takes: `_closing` says so.
    formats = list(dict.fromkeys(f for f in every if f[1] != "fp8" or _only_fp8(found)))
    heads = [f"{dtype} {quantize}" if quantize else dtype for dtype, quantize in formats]
    shown = table("instance", "devices", "each", "host", *heads, title=_title(found))
    for fit in found.instances:
        best = [fit.best(dtype, quantize) for dtype, quantize in formats]
        shown.add_row(
            fit.name,
            f"{fit.devices} x {fit.device}",
            size(fit.device_bytes),
            size(fit.host_bytes),
            *(_cell(option) for option in best),
        )
    for column in shown.columns:
        column.no_wrap = True
    shown.columns[0].min_width = max(len(fit.name) for fit in found.instances)
    return shown


def _only_fp8(found: Report) -> bool:
    """Whether the source is an artifact of fp8 weights: anything else comes with int8 beside it."""
    return found.quantize == "fp8"


def _cell(option: Option | None) -> str:
    if option is None:
        return "-"
    degree = _degree(option)
    return degree if option.batch is None else f"{degree}: {option.batch:,}"


def _degree(option: Option | Smallest) -> str:
    stages = f" pp {option.pipeline_parallel}" if option.pipeline_parallel > 1 else ""
    return f"tp {option.tensor_parallel}{stages}"


def _detail(found: Report, fit: InstanceFit) -> Table:
    title = (
        f"{_title(found)} on {fit.name}: {fit.devices} x {fit.device} with "
        f"{size(fit.device_bytes)}, host {size(fit.host_bytes)}"
    )
    if any(option.pipeline_parallel > 1 for option in fit.options):
        title += f", {fit.options[0].pipeline_parallel} stages"
    shown = table("dtype", "tp", "weights a rank", "cache a rank", "batch", "longest", title=title)
    for option in fit.options:
        name = f"{option.dtype} {option.quantize}" if option.quantize else option.dtype
        row = (name, str(option.tensor_parallel), size(option.weight_bytes))
        if not option.fits:
            shown.add_row(*row, f"does not fit: {option.reason}", "-", "-")
            continue
        batch = "-" if option.batch is None else f"{option.batch:,} of {option.max_tokens:,} tokens"
        longest = "-" if option.longest is None else f"{option.longest:,} tokens"
        shown.add_row(*row, size(option.cache_bytes), batch, longest)
    return shown


def _title(found: Report) -> str:
    own = f"{found.dtype} {found.quantize}" if found.quantize else found.dtype
    return f"{found.source}: {found.family}, {found.parameters:,} parameters, own dtype {own}"


def _closing(found: Report) -> None:
    tokens = next((o.max_tokens for i in found.instances for o in i.options if o.max_tokens), None)
    if tokens is not None and len(found.instances) > 1:
        note(f"tp D: N is the least degree D that fits, and N sequences of {tokens:,} tokens")
    if len(found.instances) > 1 and {None, "int8"} <= {best.quantize for best in found.smallest}:
        note("fp8 takes on GPUs what int8 takes")
    for best in found.smallest:
        name = f"{best.dtype} {best.quantize}" if best.quantize else best.dtype
        note(f"smallest for {name}: {best.instance} at {_degree(best)}")
    if not found.smallest:
        note("none of these instances takes it")
    note("estimates from shapes, ordered by memory and not by price; see `lmi-multi plan --help`")
