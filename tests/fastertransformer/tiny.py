"""What the tests of FasterTransformer's interface open, and ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmi_multi import fastertransformer as ft

PROMPTS = ["one", "a longer prompt", "two"]
VOCAB = 259  # ByT5's without extra ids


def opened(folder: Path, **keywords: Any) -> Any:
    return ft.init_inference(str(folder), 1, 1, "fp32", backend="cpu", **keywords)
