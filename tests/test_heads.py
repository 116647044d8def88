"""Attention in plain torch: which of torch's ways it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import lmi_multi
from lmi_multi import backends
from lmi_multi.models.spec import ModelSpec, Rope
from lmi_multi.ops.heads import Heads
from tests.families import Tiny

SPEC = ModelSpec(
    family="test", vocab=8, hidden=32, heads=2, ffn=8, position=Rope(dim=16), decoder_layers=1
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether cuDNN might be chosen, of every call of torch's attention."""
    attention, calls = F.scaled_dot_product_attention, list[bool]()

    def noted(*given: Any, **named: Any) -> Tensor:
        calls.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*given, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return calls


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_cudnn_is_left_out_on_gpus(asked: list[bool], device: str, before: bool) -> None:
    """It would make a graph for every pair of lengths. What others want stays as it was."""
    kept = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with FakeTensorMode():
            q = torch.empty(1, 3, 2, 16, device=device, dtype=torch.bfloat16)
            assert Heads(SPEC, 1).attend(q, q, q, None, 0.25, False).shape == (3, 32)
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(kept)
    assert asked == [before and device == "cpu"]


def test_cudnn_stays_where_nothing_else_may_be_used(asked: list[bool]) -> None:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]), FakeTensorMode():
        q = torch.empty(1, 3, 2, 16, device="cuda", dtype=torch.bfloat16)
        Heads(SPEC, 1).attend(q, q, q, None, 0.25, False)
    assert asked == [True]


@pytest.mark.cuda
def test_scores_make_no_graphs_of_cudnn(tmp_path: Path) -> None:
    """Texts of many lengths, whose cross-attention is torch's."""
    state = backends.probe("cuda")
    if not state.ok:
        pytest.skip(f"cuda: {state.reason}")
    sizes = {"d_model": 128, "d_kv": 64, "d_ff": 128, "num_layers": 1, "num_heads": 2}
    config: dict[str, Any] = {**sizes, "decoder_start_token_id": 0}
    Tiny("T5ForConditionalGeneration", "T5Config", config).save(tmp_path)
    texts = [[5] * length for length in range(1, 40)]
    with (
        lmi_multi.load(tmp_path, backend="cuda", dtype="bf16", max_batch=1) as model,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        assert len(model.score(texts, texts[::-1])) == 39
    names = {event.key for event in profile.key_averages()}
    assert any("scaled_dot_product" in name for name in names)
    assert not any("cudnn_attention" in name for name in names)
