"""Put what `benchmarks.steps --results` wrote into `results/cuda-steps.json`, and make the page's
table anew: `python -m benchmarks.merge_steps steps-*.json --commit e7e1e36 --date 2026-11-30`.

An entry takes the place of the older one of its shape, type, contender and number of rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "lmi_multi"
PEERS = ("torch, graphed", "CTranslate2", "transformers, static")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

Entry = dict[str, Any]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)],
    commit: Annotated[str, typer.Option(help="that was measured")],
    date: Annotated[str, typer.Option(help="as 2026-11-30")],
    results: Annotated[Path, typer.Option(exists=True, file_okay=False)] = RESULTS,
) -> None:
    """Write cuda-steps.json and cuda-steps.md."""
    path, page = results / "cuda-steps.json", results / "cuda-steps.md"
    known = json.loads(path.read_text())
    entries = {_key(entry): entry for entry in known["entries"]}
    for file in files:
        made = json.loads(file.read_text())
        facts = {"commit": commit, "date": date, "bandwidth": made["bandwidth"]}
        entries |= {_key(entry): entry | facts for entry in made["entries"]}
    known["entries"] = sorted(entries.values(), key=_key)
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(json.dumps(known, indent=1) + "\n")
    page.write_text(f"{before}{BEGIN}{table(known['entries'])}{END}{after}")


def table(entries: list[Entry]) -> str:
    """A line for each of ours, with how many times as long each peer takes; a * where that is of
    another commit."""
    by_key = {_key(entry): entry for entry in entries}
    lines = [
        "| shape | weights | rows | ms a step | torch, graphed | CTranslate2 | transformers "
        "| roofline, ms | share of it | first, ms | commit |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for entry in entries:
        who, beams = entry["who"].partition(", ")[::2]
        if who != OURS:
            continue
        peers = [by_key.get(_key(entry | {"who": peer})) for peer in PEERS]
        step, floor = entry["step"], entry["roofline"]
        cells = [
            *(entry["shape"], ", ".join(filter(None, (entry["dtype"], beams))), entry["rows"]),
            f"{step:.3f}",
            *("" if beams or peer is None else _beside(entry, peer) for peer in peers),
            *(f"{floor:.2f}", f"{floor / step:.0%}", f"{entry['first']:.1f}", entry["commit"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _beside(own: Entry, peer: Entry) -> str:
    other = "" if peer["commit"] == own["commit"] else "*"
    return f"{peer['step']:.2f} ({peer['step'] / own['step']:.2f}x){other}"


def _key(entry: Entry) -> tuple[str, str, str, int]:
    return entry["shape"], entry["dtype"], entry["who"], entry["rows"]


if __name__ == "__main__":
    app()
