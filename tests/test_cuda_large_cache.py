"""A cache of more than 2**31 elements a pool: no kernel's offsets are of 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmi_multi.engine.batch import Row
from lmi_multi.models.spec import Rope
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.paged import PagedAttention, PagedCache
from tests.test_cuda_attention import make_layer, make_spec
from tests.test_cuda_kernels import _available

__all__ = ["_available"]

pytestmark = pytest.mark.cuda
HEADS, DIM, BLOCK, OWN = 8, 128, 16, 48  # blocks that are used
FIRST = 2**31 // (BLOCK * HEADS * DIM)  # the first block beyond


def test_blocks_beyond_two_billion_elements() -> None:
    """What rows have there they find there, as in a small cache; what lies before stays zero."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("cuda: 12 GiB of free memory are wanted")
    check(torch.device("cuda", 0), FIRST)


def check(device: torch.device, first: int) -> None:
    """Every way into the cache, for blocks from `first` on and for the same from 0 on."""
    from lmi_multi.backends.cuda.attention import CudaPagedAttention, DecodeAttention
    from lmi_multi.backends.cuda.ops import Scratch
    from lmi_multi.backends.cuda.prefill import PrefillKernel
    from lmi_multi.backends.cuda.prefill_inputs import PrefillInputs

    torch.manual_seed(0)
    heads = Heads(make_spec(Rope(dim=DIM), HEADS, HEADS, DIM), 1)
    caches = [
        PagedCache(heads, count, BLOCK, torch.bfloat16, device) for count in (first + OWN, OWN)
    ]
    scratch, layer = Scratch(device), make_layer(None, 0, False, DIM)
    kernels = [DecodeAttention(cache, scratch) for cache in caches]
    qkv = torch.randn(66, 3 * HEADS * DIM).bfloat16().to(device)
    q = qkv[:, : HEADS * DIM].contiguous()

    def tops() -> list[list[Tensor]]:
        return [[cache.k[0][-OWN:], cache.v[0][-OWN:]] for cache in caches]

    def same(*found: Tensor | None) -> None:
        """Bit by bit, results as well as caches."""
        big, small = found or (q, q)
        assert big is not None and small is not None and torch.equal(big, small)
        assert all(torch.equal(*pair) for pair in zip(*tops(), strict=True))

    for pool, other in zip(*tops(), strict=True):
        pool.copy_(torch.randn(pool.shape))
        other.copy_(pool)
    steps = [[Row([0], 100 * i + 40, range(at + 16 * i, at + 16 * i + 16), 1,
                  cross_blocks=range(at + 32, at + 48), cross_length=250)
              for i in range(2)] for at in (first, 0)]  # fmt: skip
    ours = [
        CudaPagedAttention(cache, rows, device, kernel)
        for cache, rows, kernel in zip(caches, steps, kernels, strict=True)
    ]
    same(*(o._kernel.extend(layer, qkv[:2].clone(), o._where, o._angles) for o in ours))
    same(*(o._kernel.read(layer, q[:2].clone(), o._cross_where) for o in ours))
    plain = [PagedAttention(c, rows, device) for c, rows in zip(caches, steps, strict=True)]
    same(*(p.attend(layer, qkv[:2].clone()) for p in plain))

    longer = [[row._replace(token_ids=[0] * 33) for row in rows] for rows in steps]
    inputs = [PrefillInputs.of_rows(rows, BLOCK, device) for rows in longer]
    angles = heads.angles(inputs[0].positions, inputs[0].reach)
    prefills = [PrefillKernel(heads, cache) for cache in caches]
    pairs = list(zip(prefills, inputs, strict=True))
    same(*(kernel.extend(layer, qkv.clone(), own, angles) for kernel, own in pairs))
    same(*(kernel.read(layer, q.clone(), own) for kernel, own in pairs))
    kv = torch.randn(66, 2 * HEADS * DIM).bfloat16().to(device)
    assert all(kernel.store(layer, kv, own.slots) for kernel, own in pairs)
    same()
    for cache, at in zip(caches, (first, 0), strict=True):
        cache.copy([(at + 1, at + 40), (at + 2, at + 41)])
        cache.clear([at + 3, at + 42])
    same()
    for pool in (caches[0].k[0], caches[0].v[0]):
        assert torch.equal(pool[-OWN + 40], pool[-OWN + 1]) and not pool[-OWN + 42].any()
        assert not pool[:-OWN].any()
