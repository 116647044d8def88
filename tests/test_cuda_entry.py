"""How captured steps begin and end, with the kernels stood in for: what is looked up, and whose the
last norm is. The kernels themselves are in test_cuda_embed.py and test_cuda_kernels.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmi_multi.models.transformer import Transformer
from tests.cuda_stand_ins import stand_in
from tests.test_cuda_ahead import open_model

PLAIN = ("t5", "gpt2", "gptj", "llama")  # whose embedding is no more than tables
FAMILIES = (*PLAIN, "bloom", "opt-350m")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def graphs_of(folder: Path, family: str, program_rows: int = 8) -> Any:
    opened: Any = open_model(folder, family, program_rows).engine.executor
    graphs = opened._fed
    chance = torch.Generator().manual_seed(3)
    graphs.inputs.ids.random_(3, opened._network.spec.vocab, generator=chance)
    graphs.inputs.lengths.random_(1, opened.limits.max_tokens + 1, generator=chance)
    return graphs


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_what_a_step_begins_with_is_what_torch_looks_up(tmp_path: Path, family: str) -> None:
    graphs = graphs_of(tmp_path, family)
    entry, rows = graphs._entry, graphs.inputs.most
    assert (entry._lookup is not None) == (family in PLAIN)
    want = entry._by_torch(rows)
    assert (want.angles is not None) == (family in ("gptj", "llama"))
    place = entry.room(rows)
    assert entry.enter(rows, place).x is place.x
    for found in (place, entry.enter(rows)):
        for own, other in zip(found, want, strict=True):
            assert (own is None and other is None) or torch.equal(own, other)


@torch.inference_mode()
def test_tables_that_the_kernel_refuses_are_for_torch(tmp_path: Path) -> None:
    graphs = graphs_of(tmp_path, "gptj")
    torch.ops.lmi_multi.embed = lambda *_: False
    entry, rows = graphs._entry, graphs.inputs.most
    place, want = entry.room(rows), entry._by_torch(rows)
    entry.enter(rows, place)
    for found in (place, entry.enter(rows)):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_norm_before_the_head_is_applied_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    """In the head's product for few rows, and before it for more: the same logits."""
    graphs = graphs_of(tmp_path, family, program_rows=0)
    graphs.inputs.lengths.fill_(1)  # the rows share a block, of which each reads what it wrote
    fused: list[int] = []
    norm_head = Transformer.norm_head

    def noted(self: Transformer, x: Tensor, whole: bool) -> Tensor:
        fused.append(len(x))
        return norm_head(self, x, whole)

    monkeypatch.setattr(Transformer, "norm_head", noted)
    many = graphs._logits(8)
    assert fused == []
    few = graphs._logits(4)
    assert fused == [4]
    torch.testing.assert_close(few, many[:4], atol=1e-5, rtol=1e-5)
