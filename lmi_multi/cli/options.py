"""Options that several commands share, as annotated types."""

from __future__ import annotations

from typing import Annotated

import typer

LOADING = "Model and hardware"
"""The heading of these options on a help page."""

Source = Annotated[
    str,
    typer.Argument(
        help="A folder, a Hub id such as google/flan-t5-base, s3://BUCKET/PREFIX, or 'demo'."
    ),
]
Backend = Annotated[
    str, typer.Option(help="What runs it: auto, cpu, cuda or neuron.", rich_help_panel=LOADING)
]
Dtype = Annotated[
    str,
    typer.Option(help="auto (the checkpoint's own), fp32, fp16 or bf16.", rich_help_panel=LOADING),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="int8 or fp8 (e4m3): weights of one byte, a scale per output channel.",
        rich_help_panel=LOADING,
    ),
]
TensorParallel = Annotated[
    int, typer.Option(help="Ranks that share each layer.", rich_help_panel=LOADING)
]
PipelineParallel = Annotated[
    int,
    typer.Option(
        help="Stages that share the layers; each takes --tensor-parallel ranks.",
        rich_help_panel=LOADING,
    ),
]
MaxBatch = Annotated[
    int | None, typer.Option(help="Prompts computed at once.", rich_help_panel=LOADING)
]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer in all.", rich_help_panel=LOADING),
]
MemoryShare = Annotated[
    float | None,
    typer.Option(
        help="Part of a GPU's memory that the model may take, such as 0.5; else 0.9.",
        rich_help_panel=LOADING,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="A branch, tag or commit of a Hub id.", rich_help_panel=LOADING),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Check every file's sha256, not only its size.",
        rich_help_panel=LOADING,
    ),
]
Fallback = Annotated[
    str | None,
    typer.Option(
        help="transformers: run what no family declares through transformers.",
        rich_help_panel=LOADING,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
