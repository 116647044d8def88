"""`lmi-multi compile`: graphs for NeuronCores, ahead of time."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Annotated, cast

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import byte_progress, graph_progress, line, note

if TYPE_CHECKING:
    from lmi_multi.checkpoint.layout import DtypeName, QuantizeName
    from lmi_multi.fit import Network


def compile(
    source: options.Source,
    instance: Annotated[
        str, typer.Option(help="The instance type to compile for, such as inf2.48xlarge.")
    ],
    tensor_parallel: options.TensorParallel = 1,
    max_batch: options.MaxBatch = None,
    max_tokens: options.MaxTokens = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="A folder or s3://BUCKET/PREFIX for compiled graphs; else the folder that "
            "LMI_MULTI_NEURON_CACHE names, or the artifact's own."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Graphs to compile at once; else one for each CPU core.")
    ] = None,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    revision: options.Revision = None,
) -> None:
    """Compile a model's graphs for NeuronCores, so that loading it compiles nothing.

    Loading finds them if it is given the same sizes on the same type of instance. What is compiled
    already is not compiled again: an interrupted run goes on where it was.
    """
    from lmi_multi.backends import compiler
    from lmi_multi.checkpoint.cache import open_or_convert
    from lmi_multi.checkpoint.convert import check_options

    check_options(dtype, quantize, tensor_parallel)
    check = partial(
        compiler().check,
        instance=instance,
        tensor_parallel=tensor_parallel,
        max_batch=max_batch,
        max_tokens=max_tokens,
        quantize=quantize,
        cache=cache,
        jobs=jobs,
    )
    check()  # before anything of the model is looked at
    if (network := _outline(source, revision, dtype, quantize)) is not None:
        check(network=network)  # before it is downloaded or converted
    start = time.perf_counter()
    with byte_progress(f"converting {source}") as converting:
        artifact = open_or_convert(
            source,
            revision=revision,
            dtype=dtype,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            progress=converting,
        )
    with graph_progress(f"compiling {source}") as progress:
        done = compiler().compile(
            artifact,
            instance=instance,
            tensor_parallel=tensor_parallel,
            max_batch=max_batch,
            max_tokens=max_tokens,
            cache=cache,
            jobs=jobs,
            progress=progress,
        )
    count, seconds = done.count, time.perf_counter() - start
    line(done.place)
    note(
        f"{count.total} graphs: {count.total - count.hits} compiled, {count.hits} cached, "
        f"{seconds:.1f} s"
    )


def _outline(source: str, revision: str | None, dtype: str, quantize: str | None) -> Network | None:
    """What headers tell of the model that is to be; None where they do not, and it has to be there
    first: converting it says what is wrong with it, if anything is."""
    from lmi_multi.errors import CheckpointError
    from lmi_multi.fit import read_network

    try:
        network = read_network(source, revision)
    except CheckpointError:
        return None
    chosen = None if dtype == "auto" else cast("DtypeName", dtype)
    return network.converted(chosen, cast("QuantizeName | None", quantize))
