"""The decode attention kernel against float64, with outputs poisoned beforehand.

Tolerances are of the error's norm over the norm; see test_cuda_kernels.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lmi_multi.engine.batch import Row
from lmi_multi.models.bias import alibi_slopes
from lmi_multi.models.spec import Alibi, Learned, ModelSpec, Position, RelativeBias, Rope
from lmi_multi.models.weights import Layer, Linear, Norm
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.paged import PagedAttention, PagedCache
from tests.test_cuda_kernels import DTYPES, TOLERANCE, _available, _poison, error, randn

pytestmark = pytest.mark.cuda
__all__ = ["_available", "_poison"]  # fixtures


def make_layer(position_bias: Tensor | None, window: int, norms: bool, dim: int) -> Layer:
    """A layer of which only the attention's own parts matter."""
    none = Linear(torch.empty(0))
    head = (lambda: Norm(randn(dim))) if norms else (lambda: None)
    return Layer(
        index=0,
        qkv=none,
        out=none,
        up=none,
        down=none,
        norm1=Norm(torch.empty(0)),
        norm2=Norm(torch.empty(0)),
        scale=dim**-0.5,
        window=window,
        q_norm=head(),
        k_norm=head(),
        position_bias=position_bias,
    )


def widened(layer: Layer) -> Layer:
    """With norms in float64."""
    if layer.q_norm is None or layer.k_norm is None:
        return layer
    q, k = Norm(layer.q_norm.weight.double()), Norm(layer.k_norm.weight.double())
    return replace(layer, q_norm=q, k_norm=k)


POSITIONS: dict[str, Position] = {
    "learned": Learned(),
    "rope": Rope(dim=0),
    "partial-rope": Rope(dim=-1),
    "alibi": Alibi(),
    "relative": RelativeBias(buckets=32, max_distance=128),
}


def make_spec(position: Position, heads: int, kv: int, dim: int) -> ModelSpec:
    if isinstance(position, Rope):
        position = replace(position, dim=dim if position.dim == 0 else dim // 4 // 2 * 2 or 2)
    encoder = isinstance(position, RelativeBias)
    return ModelSpec(
        family="test",
        vocab=8,
        hidden=8,
        heads=heads,
        kv_heads=kv,
        head_dim=dim,
        ffn=8,
        decoder_layers=1,
        encoder_layers=int(encoder),
        position=position,
    )


def make_rows(lengths: list[int], block: int, chance: random.Random) -> tuple[list[Row], int]:
    """Rows with scattered blocks, and how many blocks there are."""
    counts = [-(-n // block) for n in lengths]
    free = list(range(2 * sum(counts) + 1))
    chance.shuffle(free)
    rows = []
    for n, count in zip(lengths, counts, strict=True):
        own, free = free[:count], free[count:]
        cross, free = free[:count], free[count:]
        row = Row([0], n - 1, own, n, cross_blocks=cross, cross_length=n)
        rows.append(row)
    return rows, 2 * sum(counts) + 1


@dataclass
class Case:
    """Rows over a cache, in the kernel's type and in float64."""

    position: str
    heads: int
    kv: int
    dim: int
    lengths: list[int]
    window: int = 0
    norms: bool = False

    def check(self, dtype: torch.dtype, chance: random.Random) -> None:
        """Self and cross attention of one token a row: outputs, what is written, and counters."""
        from lmi_multi.backends.cuda.attention import CudaPagedAttention, DecodeAttention
        from lmi_multi.backends.cuda.ops import Scratch

        device, dim, heads, kv = torch.device("cuda"), self.dim, self.heads, self.kv
        scratch = Scratch(device, max(4096, len(self.lengths) * heads))
        spec = make_spec(POSITIONS[self.position], heads, kv, dim)
        table = None
        if self.position == "alibi":
            table = alibi_slopes(heads).cuda()
        if self.position == "relative":
            table = randn(32, heads, dtype=dtype)
        layer = make_layer(table, self.window, self.norms, dim)
        rows, blocks = make_rows(self.lengths, block := chance.choice((8, 16)), chance)
        split = Heads(spec, 1)
        cache = PagedCache(split, blocks, block, dtype, device)
        cache.k[0].copy_(randn(*cache.k[0].shape, dtype=dtype))
        cache.v[0].copy_(randn(*cache.v[0].shape, dtype=dtype))
        exact = PagedCache(split, blocks, block, torch.float32, device)
        exact.k = [cache.k[0].double()]
        exact.v = [cache.v[0].double()]
        qkv = randn(len(rows), (heads + 2 * kv) * dim, dtype=dtype)

        ours = CudaPagedAttention(cache, rows, device, DecodeAttention(cache, scratch))
        theirs = PagedAttention(exact, rows, device)
        found = ours._kernel.extend(layer, qkv, ours._where, ours._angles)
        assert found is not None, self
        expected = theirs.attend(widened(layer), qkv.double())
        assert error(found, expected) < 4 * TOLERANCE[dtype], self
        new, exactly = cache.k[0].flatten(0, 1), exact.k[0].flatten(0, 1)
        slots = theirs._slots
        assert error(new[slots], exactly[slots]) < TOLERANCE[dtype], self
        exactly[slots] = new[slots].double()
        assert torch.equal(new.double(), exactly), self
        assert torch.equal(cache.v[0].double(), exact.v[0]), self

        q = qkv[:, : heads * dim].contiguous()
        expected = theirs.cross_attend(layer, q.double())
        assert error(ours.cross_attend(layer, q), expected) < 2 * TOLERANCE[dtype], self
        assert not scratch.counters.any(), self


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_attention(position: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    chance = random.Random(position)
    for dim in (8, 32, 64, 80, 96, 128, 256):
        for heads, kv in ((3, 3), (4, 2), (6, 2), (16, 2)):
            count, longest = chance.choice(((1, 4096), (3, 700), (70, 60), (2, 33)))
            lengths = [chance.randint(1, longest) for _ in range(count - 1)] + [longest]
            window, norms = chance.choice((0, 0, 5, 100)), chance.random() < 0.3
            Case(position, heads, kv, dim, lengths, window, norms).check(dtype, chance)


@pytest.mark.parametrize("dim", range(32, 257, 8))
def test_every_head_size(dim: int) -> None:
    """With rows of one token, of some, and of several splits."""
    torch.manual_seed(dim)
    chance = random.Random(dim)
    lengths = [1, 2, 128, 129, chance.randint(3, 500), 1500]
    for position, (heads, kv) in (("rope", (3, 3)), ("relative", (5, 5)), ("partial-rope", (8, 2))):
        Case(position, heads, kv, dim, lengths, norms=dim % 16 == 0).check(torch.bfloat16, chance)


@pytest.mark.parametrize("rows", range(1, 71))
def test_any_number_of_rows(rows: int) -> None:
    """Ragged ones; from 44 rows on the 24 heads are more items than there are blocks."""
    torch.manual_seed(rows)
    chance = random.Random(rows)
    lengths = [chance.choice((1, 2, 16, 31, 127, 128, 129, 200)) for _ in range(rows)]
    lengths[chance.randrange(rows)] = chance.choice((1, 700, 4096))
    position, window = chance.choice(list(POSITIONS)), chance.choice((0, 0, 3, 130))
    dim, dtype = chance.choice((32, 64)), chance.choice(DTYPES)
    Case(position, 24, 24, dim, lengths, window).check(dtype, chance)
    if rows % 10 == 0:  # grouped heads
        Case(position, 32, chance.choice((16, 8)), dim, lengths, window).check(dtype, chance)


def test_rows_do_not_harm_each_other() -> None:
    """A row whose values are infinite leaves NaN to itself, though blocks go from row to row."""
    from lmi_multi.backends.cuda.attention import DecodeAttention, Where
    from lmi_multi.backends.cuda.ops import Scratch

    torch.manual_seed(7)
    device, rows, heads, dim = torch.device("cuda"), 70, 40, 64
    cache = PagedCache(
        Heads(make_spec(Learned(), heads, heads, dim), 1), rows, 64, torch.float16, device
    )
    cache.k[0].normal_()
    cache.v[0].normal_()
    lengths = torch.tensor([(64, 7, 33, 1)[i % 4] for i in range(rows)], dtype=torch.int32).cuda()
    where = Where(lengths, torch.arange(rows, dtype=torch.int32).cuda()[:, None], 1)
    q = randn(rows, heads * dim, dtype=torch.float16)
    kernel, layer = DecodeAttention(cache, Scratch(device)), make_layer(None, 0, False, dim)
    expected = kernel.read(layer, q, where)
    assert expected is not None
    cache.v[0][::2] = torch.inf
    cache.k[0][::2] = torch.nan
    found = kernel.read(layer, q, where)
    assert found is not None
    assert torch.equal(found[1::2], expected[1::2])
    assert found[::2].isnan().any(-1).all()  # and what draws by it finds out
