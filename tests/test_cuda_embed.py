"""The kernel that begins a captured step, against torch: bit for bit, outputs poisoned before."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmi_multi import backends
from tests.families import GENERATORS
from tests.test_cuda_graphs import cuda_model

pytestmark = pytest.mark.cuda

TYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS, POSITIONS, POISON = 777, 99, -3.0


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        pytest.skip(f"cuda: {state.reason}")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def rows_of(rows: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(TOKENS, (rows,), device="cuda")
    lengths = torch.randint(1, POSITIONS + 1, (rows,), device="cuda", dtype=torch.int32)
    ids[0], lengths[0], lengths[-1] = TOKENS - 1, POSITIONS, 1
    return ids, lengths


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, POISON, device="cuda", dtype=dtype)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tables_are_looked_up(dtype: torch.dtype, wide: bool) -> None:
    """With and without positions and angles, to the tables' type and to float32."""
    torch.manual_seed(1)
    x_dtype = torch.float32 if wide else dtype
    shapes = itertools.product((1, 2, 64, 70), (8, 768, 2056, 4096), (False, True), (0, 1, 32, 300))
    for rows, features, learned, pairs in shapes:
        ids, lengths = rows_of(rows)
        tokens = randn(TOKENS, features, dtype=dtype)
        positions = randn(POSITIONS, features, dtype=dtype) if learned else None
        tables = (randn(POSITIONS, pairs), randn(POSITIONS, pairs)) if pairs else (None, None)
        x = poisoned(rows, features, dtype=x_dtype)
        angles = [poisoned(rows, pairs) if pairs else None for _ in tables]
        given = (ids, lengths, tokens, 0, positions, *tables, x, *angles)
        assert torch.ops.lmi_multi.embed(*given)
        at = lengths - 1
        want = torch.nn.functional.embedding(ids, tokens)
        if positions is not None:
            want = want + torch.nn.functional.embedding(at, positions)
        assert torch.equal(x, want.to(x_dtype)), (rows, features, learned, pairs)
        for found, table in zip(angles, tables, strict=True):
            assert table is None or torch.equal(found, table.index_select(0, at))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_other_ranks_tokens_are_zeros(dtype: torch.dtype) -> None:
    """The shares of a vocabulary in three add up to the whole, positions included."""
    torch.manual_seed(2)
    ids, lengths = rows_of(33)
    tokens, positions = randn(TOKENS, 64, dtype=dtype), randn(POSITIONS, 64, dtype=dtype)
    total = torch.zeros(33, 64, device="cuda", dtype=dtype)
    for first in range(0, TOKENS, TOKENS // 3):
        share = tokens[first : first + TOKENS // 3].clone()
        x = poisoned(33, 64, dtype=dtype)
        given = (ids, lengths, share, first, positions, None, None, x, None, None)
        assert torch.ops.lmi_multi.embed(*given)
        assert (x[(ids < first) | (ids >= first + len(share))] == 0).all()
        total += x
    assert torch.equal(total, tokens[ids] + positions[lengths.long() - 1])


def test_what_is_not_covered_is_left_alone() -> None:
    ids, lengths = rows_of(3)
    good: dict[str, Any] = {
        "ids": ids,
        "lengths": lengths,
        "tokens": randn(TOKENS, 64),
        "first": 0,
        "positions": randn(POSITIONS, 64),
        "cos_table": randn(POSITIONS, 8),
        "sin_table": randn(POSITIONS, 8),
        "x": poisoned(3, 64),
        "cos": poisoned(3, 8),
        "sin": poisoned(3, 8),
    }
    bad: list[dict[str, Any]] = [
        {"ids": ids.int()},
        {"ids": ids[:2]},
        {"lengths": lengths.long()},
        {"tokens": randn(TOKENS, 60), "x": poisoned(3, 60), "positions": None},
        {"tokens": randn(TOKENS, 128)[:, ::2]},
        {"tokens": randn(TOKENS, 64, dtype=torch.float16)},
        {"tokens": good["tokens"].to(torch.float8_e4m3fn)},
        {"positions": randn(POSITIONS, 72)},
        {"x": poisoned(3, 64, dtype=torch.float16)},
        {"sin_table": None},
        {"sin_table": randn(POSITIONS + 1, 8)},
        {"cos": poisoned(3, 9)},
        {"sin": None},
        {"cos_table": good["cos_table"].double()},
    ]
    for change in bad:
        given = good | change
        assert not torch.ops.lmi_multi.embed(*given.values()), change.keys()
        for name in ("x", "cos", "sin"):
            assert given[name] is None or (given[name] == POISON).all()
    assert torch.ops.lmi_multi.embed(*good.values())


@pytest.mark.parametrize("family", sorted(GENERATORS))
def test_families_begin_as_with_torch(tmp_path: Path, family: str) -> None:
    """Every family's own tables; the kernel does all but embeddings that are more than tables."""
    with cuda_model(tmp_path, family) as model:
        opened: Any = model.engine.executor
        graphs = opened._fed
        if graphs is None:
            pytest.skip("this family's steps are not captured")
        entry, inputs = graphs._entry, graphs.inputs
        rows = inputs.most
        inputs.ids.random_(3, opened._network.spec.vocab)
        inputs.lengths.random_(1, opened.limits.max_tokens + 1)
        want = entry._by_torch(rows)
        for to in (None, entry.room(rows)):
            found = entry.enter(rows, to)
            for own, other in zip(found, want, strict=True):
                assert (own is None and other is None) or torch.equal(own, other)
        weights = opened._network.weights
        more = (weights.embed_norm, weights.project_in, weights.segments)
        assert (entry._lookup is None) == any(part is not None for part in more)
        made = entry.room(rows)
        assert entry._lookup is None or entry._by_kernel(entry._lookup, made)
