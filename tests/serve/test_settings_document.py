"""docs/configuration.md beside the options that are read, and those that have no effect."""

from __future__ import annotations

from pathlib import Path

from lmi_multi.serve import names
from lmi_multi.serve.settings import ServeSettings

ROOT = Path(__file__).parents[2]


def _rows(heading: str) -> list[list[str]]:
    text = (ROOT / names.DOCUMENT).read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _names(cell: str) -> tuple[str, ...]:
    return tuple(name.strip().strip("`") for name in cell.split(",") if name.strip())


def _default(field: str) -> str:
    known = ServeSettings.model_fields.get(field)
    value = known.default if known else None
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def test_the_document_lists_every_option() -> None:
    written = [(_names(r[0])[0], _names(r[1]), _names(r[2]), r[3]) for r in _rows("Options")]
    assert written == [
        (o.field, o.properties, o.variables, f"`{d}`" if (d := _default(o.field)) else "")
        for o in names.OPTIONS
    ]
    assert all(row[4] for row in _rows("Options"))


def test_the_document_lists_what_has_no_effect() -> None:
    written = [tuple(map(_names, row)) for row in _rows("Accepted without effect")]
    assert written == [(i.properties, i.variables, i.allowed) for i in names.INEFFECTIVE]
