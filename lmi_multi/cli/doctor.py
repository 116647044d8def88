"""`lmi-multi doctor`: what this machine can run, and what to mend."""

from __future__ import annotations

import typer
from rich.table import Table

from lmi_multi.cli import options
from lmi_multi.cli.console import json_page, out, pairs, size, table
from lmi_multi.cli.report import Report, collect


def doctor(json: options.Json = False) -> None:
    """Show Python, torch, backends, devices, memory, disk and caches, and what to mend."""
    report = collect()
    if json:
        json_page(report)
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    console = out()
    for part in (_software(report), _backends(report), _resources(report)):
        console.print(part)
    if report["environment"]:
        console.print(_environment(report))
    for remedy in report["remedies"]:
        console.print(f"-> {remedy}", soft_wrap=True)
    if not report["remedies"]:
        console.print("nothing to mend")


def _software(report: Report) -> Table:
    shown = pairs("software")
    python, machine = report["python"], report["machine"]
    shown.add_row("python", f"{python['implementation']} {python['version']}")
    shown.add_row("", python["executable"])
    shown.add_row("platform", str(machine["platform"]))
    shown.add_row(
        "processor",
        f"{machine['processor']}: {machine['cores']} cores, {machine['threads']} threads",
    )
    shown.add_row("torch", _torch(report))
    for name, found in report["packages"].items():
        if name != "torch":
            shown.add_row(name, found or "not installed")
    return shown


def _torch(report: Report) -> str:
    torch = report["torch"]
    if torch["error"]:
        return f"{torch['version'] or 'not installed'}: {torch['error']}"
    build = f"built for CUDA {torch['cuda_build']}" if torch["cuda_build"] else "built for CPU"
    return f"{torch['version']}, {build}, {torch['threads']} threads"


def _backends(report: Report) -> Table:
    shown = table("backend", "available", "why, or devices", title="backends")
    for state in report["backends"]:
        detail = "; ".join((state["reason"], *state["devices"]))
        shown.add_row(state["name"], "yes" if state["available"] else "no", detail)
    return shown


def _resources(report: Report) -> Table:
    shown = pairs("memory and disk")
    memory = report["memory"]
    shown.add_row("memory", f"{size(memory['available'])} available of {size(memory['total'])}")
    for cache in report["caches"]:
        free = "" if cache["free"] is None else f", {size(cache['free'])} free"
        shown.add_row(f"{cache['name']} cache", f"{cache['path']}: {size(cache['bytes'])}{free}")
    return shown


def _environment(report: Report) -> Table:
    shown = pairs("environment")
    for name, value in report["environment"].items():
        shown.add_row(name, value)
    return shown
