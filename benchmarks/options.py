"""Options that several benchmarks have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.shapes import DTYPES, SHAPES

Shapes = Annotated[list[str], typer.Option("--shape", help=f"of {', '.join(SHAPES)}")]
Dtype = Annotated[str, typer.Option(help=f"of {', '.join(DTYPES)}")]
Quantize = Annotated[str, typer.Option(help="int8, fp8, or nothing")]
Results = Annotated[Path, typer.Option(help="folder to write to")]
RESULTS = Path("benchmarks/results")
