"""`lmi-multi generate`: prompts in, text out."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import byte_progress, json_line, line, note
from lmi_multi.cli.prompts import Prompts, read_prompts

if TYPE_CHECKING:
    from lmi_multi.completion import Completion
    from lmi_multi.model import Model

_TEXT = "Generation (defaults: the model's own)"


def generate(
    model: options.Source,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, lines of standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Read prompts from a file, one a line; '-' is standard input."),
    ] = None,
    token_ids: Annotated[
        list[str] | None,
        typer.Option(help="A prompt as token ids, '1,2,3'; may be repeated."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON per completion.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens.", rich_help_panel=_TEXT)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="The same, a decoder's prompt included.", rich_help_panel=_TEXT),
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="No end before this many.", rich_help_panel=_TEXT)
    ] = None,
    min_length: Annotated[
        int | None,
        typer.Option(help="The same, a decoder's prompt included.", rich_help_panel=_TEXT),
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option("--do-sample/--greedy", help="Draw tokens.", rich_help_panel=_TEXT),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits.", rich_help_panel=_TEXT)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest.", rich_help_panel=_TEXT)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest that sum to p.", rich_help_panel=_TEXT),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes draws repeatable.", rich_help_panel=_TEXT)
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos", help="Go on after the end token.", rich_help_panel=_TEXT),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End at this text; may be repeated.", rich_help_panel=_TEXT),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any other option of GenerateOptions, its value as JSON or plain text; "
            "may be repeated.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    backend: options.Backend = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    max_batch: options.MaxBatch = None,
    max_tokens: options.MaxTokens = None,
    memory_share: options.MemoryShare = None,
    revision: options.Revision = None,
    fallback: options.Fallback = None,
    verify: options.Verify = False,
) -> None:
    """Generate text from prompts.

    Answers go to standard output, in the order of the prompts.

    A last line on standard error says what ran and how fast.
    """
    wanted: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "min_new_tokens": min_new_tokens,
        "min_length": min_length,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "ignore_eos": ignore_eos,
        "stop": stop or None,
    }
    keywords = {name: value for name, value in wanted.items() if value is not None}
    keywords |= parse_options(option or [])
    prompts = read_prompts(prompt or [], file, token_ids or [])
    check_options(keywords)

    import lmi_multi

    with byte_progress(f"loading {model}") as progress:
        loaded = lmi_multi.load(
            model,
            backend=backend,
            dtype=dtype,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            max_batch=max_batch,
            max_tokens=max_tokens,
            memory_share=memory_share,
            revision=revision,
            fallback=fallback,
            verify=verify,
            progress=progress,
        )
    with loaded:
        failed = _answer(loaded, prompts, keywords, as_json=json)
        note(summary(loaded))
    if failed:
        raise typer.Exit(1)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as keywords; a value that is no JSON is text."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--option")
        try:
            parsed[name.replace("-", "_")] = json_module.loads(value)
        except ValueError:
            parsed[name.replace("-", "_")] = value
    return parsed


def check_options(keywords: dict[str, Any]) -> None:
    """Refuse invalid options before a model is loaded, which may take minutes."""
    from lmi_multi.options import GenerateOptions

    GenerateOptions(**keywords)


def summary(model: Model) -> str:
    """One line: backend, device, tokens, seconds, tokens per second."""
    stats = model.stats
    where = model.backend if model.device == model.backend else f"{model.backend} ({model.device})"
    return (
        f"{where}: {stats.generated_tokens} tokens in {stats.seconds:.2f} s, "
        f"{stats.tokens_per_second:.1f} tokens/s"
    )


def _answer(model: Model, prompts: Prompts, keywords: dict[str, Any], *, as_json: bool) -> bool:
    """Generate and print; true if a completion failed."""
    failed = False
    completions = model.generate(prompts, **keywords)
    answers = max(1, len(completions) // max(1, model.stats.prompts))  # to each prompt
    for number, completion in enumerate(completions):
        if as_json:
            json_line(record(completion))
        elif not completion.error:
            line(shown(completion))
        if completion.error:
            failed = True
            note(f"error: prompt {number // answers}: {completion.error}")
    return failed


def shown(completion: Completion) -> str:
    """The text; the token ids where the model has no tokenizer."""
    if completion.text is None:
        return ",".join(map(str, completion.token_ids))
    return completion.text


def record(completion: Completion) -> dict[str, object]:
    """A completion as a JSON object; what was not asked for is left out."""
    logprobs = completion.logprobs
    asked = {
        "score": completion.score,
        "logprobs": None if logprobs is None else [asdict(entry) for entry in logprobs],
        "cumulative_logprob": completion.cumulative_logprob,
        "prompt_logprobs": completion.prompt_logprobs,
    }
    return {
        "prompt": completion.prompt,
        "prompt_token_ids": list(completion.prompt_token_ids),
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "error": completion.error,
    } | {name: value for name, value in asked.items() if value is not None}
