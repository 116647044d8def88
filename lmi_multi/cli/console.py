"""What commands print with: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

if TYPE_CHECKING:
    from lmi_multi.backends.ahead_of_time import Count

PIPED_WIDTH = 160


_ESTIMATE_SECONDS = 3600.0  # of the past, for the time left: one graph can take minutes


class ProgressCallback(Protocol):
    """Called as bytes are written: how many of how many, and what is being written."""

    def __call__(self, done_bytes: int, total_bytes: int, name: str) -> None: ...


class GraphProgress(Protocol):
    """Called as graphs become ready: the counts, and the name of the latest."""

    def __call__(self, count: Count, name: str) -> None: ...


def out() -> Console:
    """The console of results. Made at each call: tests replace `sys.stdout`."""
    return _console(stderr=False)


def err() -> Console:
    """The console of progress bars and closing lines."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    # No markup: prompts, answers and paths hold brackets and colons of their own.
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        # A pipe has no width: rich's default of 80 would fold tables for no one.
        console.width = PIPED_WIDTH
    return console


def line(text: str) -> None:
    """Write one line to standard output as it is: no markup, no wrapping."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """Write one line to standard error as it is."""
    sys.stderr.write(text + "\n")


def json_line(value: object) -> None:
    """Write `value` as one line of JSON."""
    line(json.dumps(value, ensure_ascii=False, default=_plain))


def json_page(value: object) -> None:
    """Write `value` as indented JSON."""
    line(json.dumps(value, ensure_ascii=False, indent=2, default=_plain))


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in this program's style; long cells fold, nothing is cut off."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def pairs(title: str | None = None) -> Table:
    """An empty table of names and values, without a heading."""
    made = table("", "", title=title)
    made.show_header = False
    made.columns[0].style = "dim"
    made.columns[0].no_wrap = True
    return made


def size(count: float) -> str:
    """Bytes in words: 1536 is '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@contextmanager
def byte_progress(title: str) -> Iterator[ProgressCallback]:
    """A bar of bytes, speed and time left on standard error; nothing where it is no terminal."""
    console = err()
    cut = partial(Column, no_wrap=True, overflow="ellipsis")
    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=cut(max_width=32)),
        BarColumn(bar_width=16),
        DownloadColumn(binary_units=True, table_column=cut(min_width=13)),
        TransferSpeedColumn(table_column=cut(min_width=9)),
        TimeRemainingColumn(table_column=cut(min_width=7)),
        # What is being written takes the room that is left.
        TextColumn("{task.fields[name]}", style="dim", markup=False, table_column=cut(ratio=1)),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        expand=True,
    )
    with bar:
        task = bar.add_task(title, total=None, name="", visible=False)

        def update(done_bytes: int, total_bytes: int, name: str) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes, name=name, visible=True)

        yield update


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """Tells of a state that changes, on standard error: a spinner with the time, or, where it is
    no terminal, a line for each new state. Print nothing but notes meanwhile."""
    console, last = err(), ""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task(what)

        def update(state: str) -> None:
            nonlocal last
            if console.is_terminal:
                bar.update(task, description=f"{what}: {state}")
            elif state != last:
                note(f"{what}: {state}")
            last = state

        yield update


@contextmanager
def graph_progress(title: str) -> Iterator[GraphProgress]:
    """Graphs ready of all, time left and cache hits, on standard error: a bar on a terminal, and
    elsewhere a line a graph, as a log wants it."""
    console = err()
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}", style="dim", markup=False),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        speed_estimate_period=_ESTIMATE_SECONDS,
    )
    with bar:
        task = bar.add_task(title, total=None, state="")

        def update(count: Count, name: str) -> None:
            state = f"{count.hits} cached, {name}"
            bar.update(task, completed=count.done, total=count.total, state=state)
            if not console.is_terminal:
                seconds = bar.tasks[0].time_remaining
                left = "" if seconds is None else f", {seconds:.0f} s left"
                note(f"{count.done} of {count.total} graphs{left}: {state}")

        yield update
