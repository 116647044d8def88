"""`lmi-multi invoke`: prompts to an endpoint on SageMaker."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import json_line, line
from lmi_multi.cli.generate import check_options, parse_options
from lmi_multi.cli.prompts import Prompts, read_prompts
from lmi_multi.errors import OptionError


def invoke(
    endpoint: Annotated[str, typer.Argument(help="The endpoint's name.")],
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
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens; default: 30.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any other option of GenerateOptions, its value as JSON or plain text; "
            "may be repeated.",
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print tokens as they come; for one prompt.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Ask an endpoint, with the AWS credentials that are here.

    Answers go to standard output, in the order of the prompts; with --json one line for each, with
    its tokens and their log-probabilities; with --stream and --json one line for each token.
    """
    from lmi_multi.deploy import invoke as endpoints

    prompts = read_prompts(prompt or [], file, token_ids or [])
    parameters = parse_options(option or [])
    if max_new_tokens is not None:
        parameters["max_new_tokens"] = max_new_tokens
    check_options(parameters)
    if stream:
        _show_stream(endpoints.stream(endpoint, _one(prompts, parameters)), as_json=json)
        return
    if json:
        parameters["details"] = True
    answer = endpoints.invoke(endpoint, {"inputs": prompts, "parameters": parameters})
    for one in answer if isinstance(answer, list) else [answer]:
        text = one.get("generated_text") if isinstance(one, dict) else None
        if json or text is None:
            json_line(one)
        else:
            line(text)


def _one(prompts: Prompts, parameters: dict[str, Any]) -> dict[str, Any]:
    if len(prompts) != 1:
        raise OptionError(f"--stream is given with {len(prompts)} prompts; allowed: one")
    return {"inputs": prompts[0], "parameters": parameters}


def _show_stream(events: Any, *, as_json: bool) -> None:
    for event in events:
        if as_json:
            json_line(event)
        else:
            sys.stdout.write(event.get("token", {}).get("text", ""))
        sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
