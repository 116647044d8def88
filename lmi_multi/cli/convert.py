"""`lmi-multi convert`: a checkpoint becomes an artifact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import byte_progress, line, note, size


def convert(
    source: options.Source,
    target: Annotated[Path, typer.Argument(help="The folder to write; replaced as a whole.")],
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    tensor_parallel: options.TensorParallel = 1,
    revision: options.Revision = None,
) -> None:
    """Convert a checkpoint into an artifact that loads without converting.

    The target appears only when it is complete: an interrupted conversion leaves it as it was.
    """
    from lmi_multi.checkpoint.convert import convert as run

    start = time.perf_counter()
    with byte_progress(f"converting {source}") as progress:
        run(
            source,
            target,
            dtype=dtype,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            revision=revision,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    line(str(target))
    note(f"converted {source}: {size(written)} in {seconds:.1f} s")
