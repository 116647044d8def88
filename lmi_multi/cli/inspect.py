"""`lmi-multi inspect`: what a checkpoint or artifact is, from its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lmi_multi.cli import options
from lmi_multi.cli.console import byte_progress, json_page, out, pairs, size, table

if TYPE_CHECKING:
    from lmi_multi.checkpoint.inspect import Description

_ENGINES = {
    "lmi_multi": "lmi_multi",
    "transformers": "transformers, if asked for: --fallback transformers",
}
_HEADS = {True: "tied to the embedding", False: "own", None: "not known"}


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A checkpoint or artifact: a folder, a Hub id, s3://BUCKET/PREFIX, or 'demo'."
        ),
    ],
    json: options.Json = False,
    verify: options.Verify = False,
    revision: options.Revision = None,
) -> None:
    """Show what a checkpoint or artifact holds, without loading it."""
    from lmi_multi.checkpoint.inspect import describe

    with byte_progress(f"fetching {path}") as progress:
        description = describe(path, verify=verify, revision=revision, progress=progress)
    if json:
        json_page(description.to_json())
        return
    console = out()
    console.print(_overview(description))
    console.print(_sizes(description))
    console.print(_files(description))


def _overview(d: Description) -> Table:
    shown = pairs(d.path)
    architecture = f" ({d.architecture})" if d.architecture else ""
    shown.add_row("kind", d.kind)
    shown.add_row("engine", _ENGINES[d.engine])
    shown.add_row("family", f"{d.family}{architecture}")
    shown.add_row("parameters", f"{d.parameters:,}")
    shown.add_row("dtype", d.dtype)
    shown.add_row("quantized", d.quantize or "no")
    shown.add_row("output head", _HEADS[d.tied_head])
    shown.add_row("tensor parallel", str(d.tensor_parallel))
    shown.add_row("bytes a rank", f"{size(d.bytes_per_rank)} ({d.bytes_per_rank:,})")
    shown.add_row("possible degrees", ", ".join(map(str, d.degrees)))
    shown.add_row("source", d.source + (f" at {d.revision}" if d.revision else ""))
    shown.add_row("hashes verified", d.verified)
    return shown


def _sizes(d: Description) -> Table:
    shown = pairs("sizes")
    for name, value in d.sizes.items():
        shown.add_row(name, _short(value))
    return shown


def _short(value: object) -> str:
    """A setting in words; a nested one as name=value pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_short(inner)}" for name, inner in value.items())
    return str(value)


def _files(d: Description) -> Table:
    shown = table("file", "size", title="files")
    shown.columns[1].justify = "right"
    for name, count in d.files.items():
        shown.add_row(name, size(count))
    return shown
