"""`lmi-multi bench`: how long a model takes for its first token, and for each after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import byte_progress, json_line, line
from lmi_multi.cli.generate import parse_options

if TYPE_CHECKING:
    from lmi_multi.timing import Timing

DEFAULT_BATCHES = [1, 4, 16]


def bench(
    model: options.Source,
    batch: Annotated[
        list[int], typer.Option(help="Rows at once; may be repeated.", min=1)
    ] = DEFAULT_BATCHES,
    prompt_tokens: Annotated[int, typer.Option(help="Of each random prompt.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Generated for each.", min=2)] = 128,
    rounds: Annotated[int, typer.Option(help="The median of so many.", min=1)] = 5,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="An option that chooses among tokens, such as do_sample=true; may be repeated.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print lines of JSON.")] = False,
    backend: options.Backend = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    memory_share: options.MemoryShare = None,
    revision: options.Revision = None,
) -> None:
    """Time a model on random prompts: the first token, and each step after it.

    A step is the time of the whole answer less that of an answer of one token, over the tokens
    after the first: all that the host does is in it. An answer's length does not depend on what
    is generated, so random weights take as long as trained ones.
    """
    import lmi_multi
    from lmi_multi.errors import OptionError
    from lmi_multi.timing import check_options, time_generation

    chosen = parse_options(option or [])
    check_options(chosen)
    with byte_progress(f"loading {model}") as progress:
        loaded = lmi_multi.load(
            model,
            backend=backend,
            dtype=dtype,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            max_batch=max(batch),
            max_tokens=prompt_tokens + new_tokens,
            memory_share=memory_share,
            revision=revision,
            prefix_caching=False,  # every round has the same prompts
            progress=progress,
        )
    with loaded:
        if loaded.spec.kind == "encoder":
            raise OptionError(f"{loaded.spec.family} is an encoder and generates no text")
        if not json:
            by = "".join(f", {name}={value}" for name, value in chosen.items())
            line(f"{loaded.backend} on {loaded.device}, {prompt_tokens} + {new_tokens} tokens{by}")
        for rows in batch:
            timing = time_generation(
                loaded.engine,
                loaded.spec,
                rows,
                prompt_tokens,
                new_tokens,
                rounds,
                options=chosen,
            )
            _show(timing, chosen, json)


def _show(timing: Timing, chosen: Mapping[str, Any], json: bool) -> None:
    if json:
        given = {"options": chosen} if chosen else {}
        json_line(asdict(timing) | {"tokens_per_second": timing.tokens_per_second} | given)
        return
    line(
        f"{timing.rows:4} rows  first token {timing.first:9.2f} ms  step {timing.step:8.3f} ms  "
        f"{timing.tokens_per_second:9.1f} tokens/s"
    )
