"""The two files that a run leaves: all figures as JSON, and a page for people."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions


def command(module: str) -> str:
    """What was asked for on the command line, but for where results go."""
    given, kept = iter(sys.argv[1:]), []
    for word in given:
        if word == "--results":
            next(given, None)
        elif not word.startswith("--results="):
            kept.append(word)
    return shlex.join(["python", "-m", module, *kept])


def write(
    folder: Path, name: str, command: str, device: str, figures: Mapping[str, Any], text: str
) -> None:
    """Write NAME.json, with date, machine and versions beside `figures`, and NAME.md: `text`, in
    which {where} stands for the machine and its versions."""
    page = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(device),
        "versions": versions(),
    }
    (folder / f"{name}.json").write_text(json.dumps(page | dict(figures), indent=1) + "\n")
    (folder / f"{name}.md").write_text(text.replace("{where}", _where(page)))


def _where(page: Mapping[str, Any]) -> str:
    """One phrase of it."""
    facts, known = page["machine"], page["versions"]
    named = facts.get("gpu", f"{facts['processor']}, {facts['cores']} cores")
    libraries = ", ".join(f"{n} {v}" for n, v in known.items() if n in ("torch", "python"))
    return f"{named}, {libraries}, lmi_multi {known['lmi_multi']}, {page['date'][:10]}"
