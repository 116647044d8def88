"""Draw `benchmarks/results/cuda-steps.json` as docs/performance.svg: `python -m benchmarks.plot`.

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
SHAPES = ("flan-t5-base", "flan-t5-xxl", "gpt-j-6b", "llama-2-7b")
COLOURS = {
    "roofline": "#bbbbbb",
    "lmi_multi": "#1f6fb4",
    "torch, graphed": "#5b9a57",
    "CTranslate2": "#8d6cab",
    "transformers, static": "#d98032",
}


def main() -> None:
    """Bars of milliseconds a step, a panel a shape."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("matplotlib was not found: pip install matplotlib") from None
    entries = json.loads((ROOT / "results" / "cuda-steps.json").read_text())["entries"]
    figure, panels = pyplot.subplots(1, len(SHAPES), figsize=(13, 3.2), layout="constrained")
    for panel, shape in zip(panels, SHAPES, strict=True):
        own = [e for e in entries if e["shape"] == shape and e["dtype"] == "bf16"]
        rows = sorted({e["rows"] for e in own})
        for i, who in enumerate(COLOURS):
            values = [_step(own, who, n) for n in rows]
            at = [place + 0.17 * (i - len(COLOURS) // 2) for place in range(len(rows))]
            panel.bar(at, values, 0.16, color=COLOURS[who], label=who)
        panel.set_title(shape)
        panel.set_xticks(range(len(rows)), [str(n) for n in rows])
        panel.set_xlabel("rows")
    panels[0].set_ylabel("ms a decode step, bf16")
    panels[1].legend(loc="upper left", fontsize=8)
    figure.savefig(ROOT.parent / "docs" / "performance.svg", metadata={"Date": None})


def _step(entries: list[dict[str, Any]], who: str, rows: int) -> float:
    """0 where it was not measured."""
    if who == "roofline":
        return float(max(e["roofline"] for e in entries if e["rows"] == rows))
    return float(next((e["step"] for e in entries if (e["who"], e["rows"]) == (who, rows)), 0.0))


if __name__ == "__main__":
    main()
