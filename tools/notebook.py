"""Writes a notebook from a script whose cells begin with `# %%` or `# %% [markdown]`.

python tools/notebook.py examples/sagemaker/walkthrough.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(script: str) -> dict[str, Any]:
    """The notebook (format 4.5) of a script's cells; what stands before the first is left out."""
    _, *parts = CELL.split(script)
    cells = [
        _cell(f"cell-{number}", bool(kind), text.strip())
        for number, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True))
    ]
    return {"cells": cells, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}


def _cell(name: str, is_text: bool, source: str) -> dict[str, Any]:
    if is_text:
        text = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}
    code: dict[str, Any] = {"cell_type": "code", "id": name, "metadata": {}, "source": source}
    return code | {"execution_count": None, "outputs": []}


def main() -> None:
    """Write a notebook beside every script that is named."""
    for file in map(Path, sys.argv[1:]):
        made = json.dumps(notebook(file.read_text()), indent=1)
        file.with_suffix(".ipynb").write_text(f"{made}\n")


if __name__ == "__main__":
    main()
