"""`lmi-multi cache`: what the cache holds, and how to be rid of it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import json_page, line, note, out, table


def cache(
    remove: Annotated[
        list[str] | None,
        typer.Option(help="Remove an entry, by its name in the list; may be repeated."),
    ] = None,
    json: options.Json = False,
) -> None:
    """List downloads from S3 and converted artifacts, or remove some.

    Nothing is ever removed by itself. What is needed again is downloaded or converted again.
    """
    from lmi_multi.checkpoint import stored
    from lmi_multi.checkpoint.files import cache_dir, gib

    for name in remove or ():
        note(f"removed {name}: {gib(stored.remove(name))}")
    if remove:
        return
    found = stored.entries()
    if json:
        json_page([vars(entry) for entry in found])
        return
    if not found:
        line(f"{cache_dir()} holds nothing")
        return
    shown = table("entry", "size", "since")
    for entry in found:
        since = datetime.fromtimestamp(entry.made).strftime("%Y-%m-%d %H:%M")
        shown.add_row(entry.name, gib(entry.nbytes), since)
    out().print(shown)
    note(f"{gib(sum(entry.nbytes for entry in found))} in {cache_dir()}")
