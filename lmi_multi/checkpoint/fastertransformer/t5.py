"""T5's settings and files."""

from __future__ import annotations

from typing import Any

from lmi_multi.checkpoint.fastertransformer.bins import Bins, Layout, Table, third, transposed
from lmi_multi.checkpoint.fastertransformer.ini import Ini
from lmi_multi.errors import CheckpointError, UnsupportedModelError

_T5_SAME = ("d_model", "d_kv", "num_heads", "d_ff", "vocab_size")
_BUCKETS = "relative_attention_num_buckets_or_max_pos_seq_len"


def t5(ini: Ini) -> Layout:
    """T5, T5 v1.1, FLAN-T5 and mT5."""
    if "decoder" not in ini.sections:
        raise UnsupportedModelError(
            f"{ini.path}: [decoder] is missing or empty; an encoder alone is not supported"
        )
    ini.forbid(
        "structure",
        t5_with_bias=False,
        t5_with_moe=False,
        position_embedding_type="relative",
        ia3_num_tasks=0,
    )
    for section in ("encoder", "decoder"):
        ini.forbid(section, adapter_inter_size=0, num_tasks=0)
    kind = ini.text("encoder", "model_type", "t5")
    if kind not in ("t5", "mt5"):
        raise UnsupportedModelError(
            f"{ini.path}: [encoder] model_type is {kind!r:.80}; supported: t5, mt5"
        )
    for key in (*_T5_SAME, _BUCKETS, "feed_forward_proj", "weight_data_type"):
        left, right = (ini.text(section, key) for section in ("encoder", "decoder"))
        if left != right:
            raise UnsupportedModelError(
                f"{ini.path}: {key} is {left!r:.80} in [encoder] and {right!r:.80} in [decoder]; "
                "they must be the same"
            )
    config = _t5_config(ini)
    tensors = _t5_tensors(config, gated=config["feed_forward_proj"].startswith("gated-"))
    return Layout(
        config,
        tensors,
        ini.dtype("encoder"),
        optional=("lm_head.weight",),
        ignored=("shared.weight.bin",),  # shared.weight_T.bin, transposed
    )


def _t5_config(ini: Ini) -> dict[str, Any]:
    projection = ini.text("encoder", "feed_forward_proj")
    gated = projection.startswith("gated-")
    if ini.flag("structure", "use_gated_activation", gated) != gated:
        raise CheckpointError(
            f"{ini.path}: [structure] use_gated_activation does not fit [encoder] "
            f"feed_forward_proj, which is {projection!r:.80}"
        )
    config: dict[str, Any] = {key: ini.size("encoder", key) for key in _T5_SAME}
    scaled = ini.value("decoder", "scale_decoder_outputs")
    kind = ini.text("encoder", "model_type", "t5")
    return config | {
        # T5's own class has read most mT5s as well; what is told then is whether to scale logits.
        "architectures": [f"{'MT5' if kind == 'mt5' else 'T5'}ForConditionalGeneration"],
        "model_type": kind,
        "num_layers": ini.size("encoder", "num_layers"),
        "num_decoder_layers": ini.size("decoder", "num_layers"),
        "relative_attention_num_buckets": ini.size("encoder", _BUCKETS),
        "relative_attention_max_distance": ini.whole(
            "encoder", "relative_attention_max_distance", 128
        ),
        "feed_forward_proj": projection,
        "layer_norm_epsilon": ini.number("encoder", "layer_norm_epsilon", 1e-6),
        "tie_word_embeddings": ini.flag("decoder", "tie_word_embeddings", True),
        "scale_decoder_outputs": None
        if scaled is None
        else ini.flag("decoder", "scale_decoder_outputs", True),
        "pad_token_id": ini.whole("decoder", "pad_token_id"),
        "eos_token_id": ini.whole("decoder", "eos_token_id"),
        "decoder_start_token_id": ini.whole("decoder", "decoder_start_token_id"),
    }


def _t5_tensors(config: dict[str, Any], gated: bool) -> Table:
    hidden, vocab = config["d_model"], config["vocab_size"]
    table: Table = {
        "shared.weight": Bins("shared.weight_T", (vocab, hidden)),
        "lm_head.weight": Bins("lm_head.weight", (vocab, hidden)),
    }
    for stack, layers in (
        ("encoder", config["num_layers"]),
        ("decoder", config["num_decoder_layers"]),
    ):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shape = (config["num_heads"], config["relative_attention_num_buckets"])
        table[bias] = Bins(bias, shape, 0, transposed)
        table |= _t5_plain(f"{stack}.final_layer_norm", hidden)
        for layer in range(layers):
            table |= _t5_layer(config, stack, f"{stack}.block.{layer}.layer.", gated)
    return table


def _t5_layer(config: dict[str, Any], stack: str, at: str, gated: bool) -> Table:
    hidden, ffn = config["d_model"], config["d_ff"]
    inner = config["num_heads"] * config["d_kv"]
    table: Table = {}
    last = 2 if stack == "decoder" else 1
    for number in range(last + 1):
        table |= _t5_plain(f"{at}{number}.layer_norm", hidden)
    attention = f"{at}0.SelfAttention"
    for index, part in enumerate("qkv"):
        name = f"{attention}.{part}.weight"
        if stack == "decoder":
            stored = Bins(f"{attention}.qkv.weight", (hidden, 3, inner), 2, third(index))
        else:
            stored = Bins(name, (hidden, inner), 1, transposed)
        table[name] = stored
    table[f"{attention}.o.weight"] = Bins(f"{attention}.o.weight", (inner, hidden), 0, transposed)
    if stack == "decoder":
        cross = f"{at}1.EncDecAttention"
        for part in "qkv":
            table[f"{cross}.{part}.weight"] = Bins(
                f"{cross}.{part}.weight", (hidden, inner), 1, transposed
            )
        table[f"{cross}.o.weight"] = Bins(f"{cross}.o.weight", (inner, hidden), 0, transposed)
    dense = f"{at}{last}.DenseReluDense"
    stored_as = {"wi_0": "wi", "wi_1": "wi2"} if gated else {"wi": "wi"}
    for part, file in stored_as.items():
        table[f"{dense}.{part}.weight"] = Bins(
            f"{dense}.{file}.weight", (hidden, ffn), 1, transposed
        )
    table[f"{dense}.wo.weight"] = Bins(f"{dense}.wo.weight", (ffn, hidden), 0, transposed)
    return table


def _t5_plain(name: str, width: int) -> Table:
    return {f"{name}.weight": Bins(f"{name}.weight", (width,))}
