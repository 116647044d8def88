"""Tiny models behind FasterTransformer's interface, and what reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

import lmi_multi
from lmi_multi import fastertransformer as ft
from tests.families import FAMILIES

from .tiny import VOCAB, opened


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random byte-level checkpoints."""
    root = tmp_path_factory.mktemp("ft")
    for name in ("t5", "gpt2"):
        FAMILIES[name].save(root / name, vocab=VOCAB)
        ByT5Tokenizer(extra_ids=0).save_pretrained(root / name)
    return {name: root / name for name in ("t5", "gpt2")}


@pytest.fixture(scope="module")
def t5(folders: dict[str, Path]) -> Iterator[ft.T5Model]:
    with opened(folders["t5"]) as handle:
        yield handle


@pytest.fixture(scope="module")
def gpt(folders: dict[str, Path]) -> Iterator[ft.GPTModel]:
    with opened(folders["gpt2"], max_tokens=100) as handle:
        yield handle


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every prompt that reached `Model.generate` while the test ran."""
    seen: list[dict[str, Any]] = []
    generate = lmi_multi.Model.generate

    def watched(self: lmi_multi.Model, prompts: Any, options: Any, **keywords: Any) -> Any:
        seen.extend(options)
        return generate(self, prompts, options, **keywords)

    monkeypatch.setattr(lmi_multi.Model, "generate", watched)
    return seen
