"""Perplexity of a decoder over windows against Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

import lmi_multi
from lmi_multi.cli.perplexity import measure
from tests.families import Tiny, _gpt

TEXT = "Every token but the first is predicted once, whatever the length of the text. " * 2


@pytest.mark.parametrize("context", [40, 200])
def test_windows_predict_every_token_once(tmp_path: Path, context: int) -> None:
    model = Tiny("GPT2LMHeadModel", "GPT2Config", _gpt(n_positions=200)).save(tmp_path, vocab=259)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.save_pretrained(tmp_path)
    with lmi_multi.load(tmp_path, backend="cpu", dtype="fp32", max_tokens=context) as ours:
        total, tokens = measure(ours, TEXT)
    ids = tokenizer.encode(TEXT)
    assert tokens == len(ids) - 1
    expected, start, end = 0.0, 1, min(context, len(ids))
    while start < len(ids):
        window = torch.tensor([ids[max(0, end - context) : end]])
        with torch.no_grad():
            scores = model(window).logits[0, :-1].log_softmax(-1)
        picked = scores.gather(-1, window[0, 1:, None])[:, 0]
        expected += picked[-(end - start) :].sum().item()
        start, end = end, min(end + context // 2, len(ids))
    assert total == pytest.approx(expected, rel=1e-5)
