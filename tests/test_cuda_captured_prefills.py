"""The CUDA executor's prefills and known tokens, with everything that needs a GPU stood in for.

The same with real graphs and kernels is in test_cuda_prefill.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import executor, prefill_graphs
from torch import Tensor

from lmi_multi.models.spec import ModelSpec, Rope
from lmi_multi.models.weights import Layer
from lmi_multi.ops.packed import PackedAttention
from tests.families import VOCAB
from tests.test_cuda_ahead import FAMILIES, folder, open_model, programs
from tests.test_cuda_graphs import cpu_model, prompts

__all__ = ["folder", "programs"]  # fixtures


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_prefilled_by_graphs(
    monkeypatch: pytest.MonkeyPatch, folder: Path, family: str
) -> None:
    """And by the kernels alone where there are too many tokens or rows for a graph."""
    monkeypatch.setattr(prefill_graphs, "SIZES", (16, 32))
    monkeypatch.setattr(prefill_graphs, "LARGER", ())
    monkeypatch.setattr(prefill_graphs, "MOST_ROWS", 3)
    uncaptured: list[int] = []
    for name in ("decode", "encode_to_cache"):
        method = getattr(executor.Prefill, name)

        def noted(self: Any, own: Any, method: Any = method) -> Any:
            uncaptured.append(len(own))
            return method(self, own)

        monkeypatch.setattr(executor.Prefill, name, noted)
    chance = random.Random(9)
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        for lengths, expected in (
            ((2,), []), ((16,), []), ((9, 20, 3), []), ((9, 20, 4), [3]), ((5, 5, 5, 5), [4]),
            ((60,), [1]), ((9, 20, 3), []),
        ):  # fmt: skip
            own = [[chance.randrange(3, VOCAB) for _ in range(n)] for n in lengths]
            answers = [c.token_ids for c in cpu.generate(own, max_new_tokens=3)]
            uncaptured.clear()
            assert [c.token_ids for c in model.generate(own, max_new_tokens=3)] == answers
            assert uncaptured == expected
        captured = model.engine.executor._prefill_graphs._captured  # type: ignore[attr-defined]
        assert sorted(size for _, size, _ in captured) == [16, 32]


def test_sizes_of_captured_prefills() -> None:
    """Up to 512 tokens of any network; of small layers as many as keep the GPU busy no longer."""

    def spec(hidden: int, heads: int, ffn: int) -> ModelSpec:
        sizes = {"vocab": 8, "hidden": hidden, "heads": heads, "ffn": ffn, "head_dim": 64}
        layers = {"decoder_layers": 1, "gated": True}
        return ModelSpec(family="t5", position=Rope(dim=8), **sizes, **layers)  # type: ignore[arg-type]

    base, large, xxl = spec(768, 12, 2048), spec(1024, 16, 2816), spec(4096, 64, 10240)
    assert prefill_graphs.sizes(base, 1)[-1] == 8192
    assert prefill_graphs.sizes(large, 1)[-1] == 5120
    assert prefill_graphs.sizes(large, 2)[-1] == 8192  # half a layer each
    assert prefill_graphs.sizes(xxl, 1) == prefill_graphs.SIZES


@pytest.mark.parametrize("covered", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_known_tokens_attend_by_the_kernel(
    monkeypatch: pytest.MonkeyPatch, folder: Path, family: str, covered: bool
) -> None:
    """A decoder's to themselves, where it covers that; their cross-attention is torch's."""
    kernel, attend = torch.ops.lmi_multi.prefill, PackedAttention.attend
    by_torch: list[int] = []

    def also(self: PackedAttention, layer: Layer, qkv: Tensor) -> Tensor:
        by_torch.append(layer.index)
        return attend(self, layer, qkv)

    texts, answers = prompts(5, 9), [[3, 4, 5], [6], [7, 8], [9] * 7, [10]]
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        expected = cpu.score(texts, answers)
        torch.ops.lmi_multi.prefill = kernel if covered else lambda *_: False
        monkeypatch.setattr(PackedAttention, "attend", also)
        for own, other in zip(model.score(texts, answers), expected, strict=True):
            assert own == pytest.approx(other, abs=2e-5)
    assert bool(by_torch) is not covered


@pytest.mark.parametrize("family", ["t5", "llama-gqa"])
def test_prompts_that_the_kernels_do_not_cover_are_for_torch(folder: Path, family: str) -> None:
    torch.ops.lmi_multi.prefill = torch.ops.lmi_multi.write_kv = lambda *_: False
    own = prompts(6, 10)
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        opened: Any = model.engine.executor
        assert opened._prefill_graphs is None
        assert opened.clears_blocks
        expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=5)]
        assert [c.token_ids for c in model.generate(own, max_new_tokens=5)] == expected
