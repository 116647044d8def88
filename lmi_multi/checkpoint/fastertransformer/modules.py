"""The modules that decoders are made of, as files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmi_multi.checkpoint.fastertransformer.bins import Bins, Table, View, third, transposed
from lmi_multi.checkpoint.fastertransformer.ini import Ini


@dataclass(frozen=True)
class Sizes:
    """What every decoder's section tells."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    vocab: int

    @classmethod
    def of(cls, ini: Ini, section: str) -> Sizes:
        """Read them from `section`."""
        keys = ("num_layer", "head_num", "size_per_head", "inter_size", "vocab_size")
        return cls(*(ini.size(section, key) for key in keys))

    @property
    def hidden(self) -> int:
        """The width of the residual: FasterTransformer's decoders have no other."""
        return self.heads * self.head_dim


def norm(source: str, stem: str, width: int) -> Table:
    """A norm's weight and bias."""
    return {f"{source}.{part}": Bins(f"{stem}.{part}", (width,)) for part in ("weight", "bias")}


def first(source: str, stem: str, shape: tuple[int, int], view: View = transposed) -> Table:
    """The first matrix of a pair: its outputs are shared out, and so is its bias."""
    return {
        f"{source}.weight": Bins(f"{stem}.weight", shape, 1, view),
        f"{source}.bias": Bins(f"{stem}.bias", shape[1:], 0),
    }


def second(
    source: str,
    stem: str,
    shape: tuple[int, int],
    view: View = transposed,
    divided: bool = False,
) -> Table:
    """The second matrix of a pair: its inputs are shared out, its bias is stored once."""
    return {
        f"{source}.weight": Bins(f"{stem}.weight", shape, 0, view),
        f"{source}.bias": Bins(f"{stem}.bias", shape[1:], divided=divided),
    }


def qkv(s: Sizes, stem: str, view: View) -> Bins:
    """q, k and v in one matrix."""
    return Bins(stem, (s.hidden, 3, s.hidden), 2, view)


def qkv_bias(s: Sizes, stem: str, view: View) -> Bins:
    """The biases of q, k and v in one tensor."""
    return Bins(stem, (3, s.hidden), 1, view)


def separate_qkv(s: Sizes, source: str, at: str, bias: bool) -> Table:
    """q, k and v, which the family's own checkpoints hold one by one."""
    stem = f"{at}attention.query_key_value"
    table: Table = {}
    for index, part in enumerate("qkv"):
        table[f"{source}.{part}_proj.weight"] = qkv(s, f"{stem}.weight", third(index))
        if bias:
            table[f"{source}.{part}_proj.bias"] = qkv_bias(s, f"{stem}.bias", _row(index))
    return table


def megatron_layer(s: Sizes, own: str, at: str, attention: str, divided: bool = False) -> Table:
    """BLOOM and GPT-NeoX: their names are those of the files, and each head has its q, k, v."""
    up, down = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    stem, source = f"{at}attention.query_key_value", f"{own}{attention}.query_key_value"
    table = norm(f"{own}input_layernorm", f"{at}input_layernorm", s.hidden)
    table |= norm(f"{own}post_attention_layernorm", f"{at}post_attention_layernorm", s.hidden)
    table |= first(f"{own}{up}", f"{at}{up}", (s.hidden, s.ffn))
    for name, file, width in (
        (f"{own}{attention}.dense", f"{at}attention.dense", s.hidden),
        (f"{own}{down}", f"{at}{down}", s.ffn),
    ):
        table |= second(name, file, (width, s.hidden), divided=divided)
    table[f"{source}.weight"] = qkv(s, f"{stem}.weight", by_heads(s.heads))
    table[f"{source}.bias"] = qkv_bias(s, f"{stem}.bias", by_heads(s.heads))
    return table


def _row(index: int) -> View:
    return lambda whole: whole[index]


def side_by_side(whole: Tensor) -> Tensor:
    """[in, 3, out] -> [in, 3 x out]; a bias [3, out] -> [3 x out]."""
    return whole.flatten(-2)


def by_heads(heads: int) -> View:
    """[in, 3, heads x d] -> [heads x 3 x d, in]; a bias [3, heads x d] -> [heads x 3 x d]."""

    def view(whole: Tensor) -> Tensor:
        split = whole.reshape(*whole.shape[:-1], heads, -1).transpose(-3, -2).flatten(-3)
        return split.t() if split.dim() == 2 else split

    return view


def from_two(whole: Tensor) -> Tensor:
    """OPT numbers its positions from 2; the two rows before that are not stored."""
    return torch.cat((whole.new_zeros(2, whole.shape[1]), whole))
