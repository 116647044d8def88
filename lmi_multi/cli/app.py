"""The typer application: its commands, its help, its version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from lmi_multi.cli.bench import bench
from lmi_multi.cli.cache import cache
from lmi_multi.cli.compile import compile
from lmi_multi.cli.convert import convert
from lmi_multi.cli.demo import demo
from lmi_multi.cli.deploy import deploy, undeploy
from lmi_multi.cli.doctor import doctor
from lmi_multi.cli.generate import generate
from lmi_multi.cli.inspect import inspect
from lmi_multi.cli.invoke import invoke as ask
from lmi_multi.cli.perplexity import perplexity
from lmi_multi.cli.plan import plan
from lmi_multi.cli.serve import serve

NAME = "lmi-multi"

app = typer.Typer(
    name=NAME,
    help="Run large models on NVIDIA GPUs, AWS Inferentia and Trainium, and CPU.",
    epilog="Exit codes: 0 done, 1 failure, 2 bad usage, 130 interrupted.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    *(generate, perplexity, convert, compile, inspect, plan, bench),
    *(serve, deploy, ask, undeploy),
    *(cache, doctor, demo),
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"{NAME} {version('lmi_multi')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        # Taken from the command line by `main.run`; declared here for the help page.
        typer.Option("--debug", help="Show the traceback of an error."),
    ] = False,
) -> None:
    """Options of every command."""


def invoke(args: Sequence[str]) -> int:
    """Parse and run `args`, none being `--help`; returns the exit code. Errors are raised."""
    command = typer.main.get_command(app)
    try:
        with command.make_context(NAME, list(args) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return int(end.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    return 0
