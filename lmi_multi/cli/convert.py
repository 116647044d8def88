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
    target: Annotated[
        str, typer.Argument(help="The folder to write, or s3://BUCKET/PREFIX; replaced as a whole.")
    ],
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    tensor_parallel: options.TensorParallel = 1,
    revision: options.Revision = None,
) -> None:
    """Convert a checkpoint into an artifact that loads without converting.

    The target appears only when it is complete: an interrupted conversion leaves it as it was. On
    S3 the artifact is made in the cache first; one that is an artifact already is only uploaded.
    """
    from lmi_multi.checkpoint.convert import convert as run
    from lmi_multi.checkpoint.publish import publish
    from lmi_multi.checkpoint.s3.address import is_address

    start = time.perf_counter()
    with byte_progress(f"converting {source}") as progress:
        write = publish if is_address(target) else run
        artifact = write(
            source,
            target,
            dtype=dtype,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            revision=revision,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    line(target)
    note(f"converted {source}: {size(_bytes(artifact.folder))} in {seconds:.1f} s")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
