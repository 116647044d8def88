"""`lmi-multi perplexity`: how well a model predicts a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import byte_progress, json_line, line

if TYPE_CHECKING:
    from lmi_multi.model import Model


def perplexity(
    model: options.Source,
    file: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A text; for an encoder-decoder one prompt, a tab and its answer a line.",
        ),
    ],
    json: options.Json = False,
    backend: options.Backend = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of context.", rich_help_panel=options.LOADING)
    ] = None,
    revision: options.Revision = None,
    fallback: options.Fallback = None,
) -> None:
    """Print the perplexity of a text: exp of the mean negative log-likelihood a token.

    A text that is longer than the context is read in windows; each sees half of the one before.
    """
    import lmi_multi
    from lmi_multi.errors import OptionError

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} is no UTF-8 text: {error}") from None
    with byte_progress(f"loading {model}") as progress:
        loaded = lmi_multi.load(
            model,
            backend=backend,
            dtype=dtype,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            max_tokens=max_tokens,
            revision=revision,
            fallback=fallback,
            progress=progress,
        )
    with loaded:
        total, tokens = measure(loaded, text)
    value = math.exp(-total / tokens)
    if json:
        json_line({"perplexity": value, "tokens": tokens, "log_likelihood": total})
    else:
        line(f"perplexity {value:.6f} over {tokens} tokens")


def measure(model: Model, text: str) -> tuple[float, int]:
    """Log-likelihood in all, and the tokens it is summed over."""
    from lmi_multi.errors import OptionError

    if model.tokenizer is None:
        raise OptionError("perplexity needs a tokenizer, and the model has none")
    if model.spec.kind == "encoder-decoder":
        pairs = [row.split("\t") for row in text.splitlines() if row.strip()]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise OptionError("each line must be a prompt, one tab, and its answer")
        scores = model.score([p for p, _ in pairs], [a for _, a in pairs])
    else:
        ids = model.tokenizer.encode(text)
        size = model.limits.max_tokens
        if len(ids) < 2:
            raise OptionError("the text must have at least two tokens")
        # What a window predicts: all but its first token, later ones the half that is new.
        ends = [min(size, len(ids))]
        while ends[-1] < len(ids):
            ends.append(min(ends[-1] + max(1, size // 2), len(ids)))
        starts = [1, *ends[:-1]]
        scores = model.score(
            [ids[max(0, end - size) : start] for start, end in zip(starts, ends, strict=True)],
            [ids[start:end] for start, end in zip(starts, ends, strict=True)],
        )
    return float(sum(s.sum(dtype="float64") for s in scores)), sum(len(s) for s in scores)
