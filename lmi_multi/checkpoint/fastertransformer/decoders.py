"""Settings and files of GPT-2, OPT, BLOOM, GPT-J and GPT-NeoX."""

from __future__ import annotations

import math
from typing import Any

from lmi_multi.checkpoint.fastertransformer import modules as m
from lmi_multi.checkpoint.fastertransformer.bins import Bins, Layout, Table, same, transposed
from lmi_multi.checkpoint.fastertransformer.ini import Ini
from lmi_multi.errors import UnsupportedModelError


def gpt(ini: Ini) -> Layout:
    """The section [gpt] is GPT-2, OPT or BLOOM: they differ in a few settings."""
    ini.forbid("gpt", has_adapters=False, num_tasks=0, expert_num=0)
    if ini.flag("gpt", "use_attention_linear_bias", False):
        return _bloom(ini)
    activation = ini.text("gpt", "activation_type", "Gelu")
    if activation.lower() == "relu":
        return _opt(ini)
    if activation.lower() != "gelu":
        raise UnsupportedModelError(
            f"{ini.path}: [gpt] activation_type is {activation!r:.80}; supported: Gelu, Relu"
        )
    return _gpt2(ini)


def _common(ini: Ini, section: str, sizes: m.Sizes) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocab,
        "bos_token_id": ini.whole(section, "start_id"),
        "eos_token_id": ini.whole(section, "end_id"),
    }


def _gpt2(ini: Ini) -> Layout:
    ini.forbid(
        "gpt",
        model_variant="gpt",
        layernorm_type="pre_layernorm",
        has_positional_encoding=True,
        has_pre_decoder_layernorm=False,
        has_post_decoder_layernorm=True,
    )
    s, positions = m.Sizes.of(ini, "gpt"), ini.size("gpt", "max_pos_seq_len")
    config = _common(ini, "gpt", s) | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": s.hidden,
        "n_layer": s.layers,
        "n_head": s.heads,
        "n_inner": s.ffn,
        "n_positions": positions,
        "activation_function": "gelu_new",
        # GPT-2's own where its converter does not tell.
        "layer_norm_epsilon": ini.number("gpt", "layernorm_eps", 1e-5),
    }
    table: Table = {
        "wte.weight": Bins("model.wte", (s.vocab, s.hidden)),
        "wpe.weight": Bins("model.wpe", (positions, s.hidden)),
        "lm_head.weight": Bins("model.lm_head.weight", (s.vocab, s.hidden)),
    } | m.norm("ln_f", "model.final_layernorm", s.hidden)
    for i in range(s.layers):
        own, at = f"h.{i}.", f"model.layers.{i}."
        qkv = f"{at}attention.query_key_value"
        table |= (
            m.norm(f"{own}ln_1", f"{at}input_layernorm", s.hidden)
            | m.norm(f"{own}ln_2", f"{at}post_attention_layernorm", s.hidden)
            | {
                f"{own}attn.c_attn.weight": m.qkv(s, f"{qkv}.weight", m.side_by_side),
                f"{own}attn.c_attn.bias": m.qkv_bias(s, f"{qkv}.bias", m.side_by_side),
            }
            | m.second(f"{own}attn.c_proj", f"{at}attention.dense", (s.hidden, s.hidden), same)
            | m.first(f"{own}mlp.c_fc", f"{at}mlp.dense_h_to_4h", (s.hidden, s.ffn), same)
            | m.second(f"{own}mlp.c_proj", f"{at}mlp.dense_4h_to_h", (s.ffn, s.hidden), same)
        )
    return _decoder(ini, "gpt", config, table)


def _opt(ini: Ini) -> Layout:
    ini.forbid("gpt", has_positional_encoding=True, has_pre_decoder_layernorm=False)
    order = ini.text("gpt", "layernorm_type", "pre_layernorm")
    if order not in ("pre_layernorm", "post_layernorm"):
        raise UnsupportedModelError(
            f"{ini.path}: [gpt] layernorm_type is {order!r:.80}; supported: pre_layernorm, "
            "post_layernorm"
        )
    if ini.number("gpt", "layernorm_eps", 1e-5) != 1e-5:
        raise UnsupportedModelError(
            f"{ini.path}: [gpt] layernorm_eps is not 1e-5, which every OPT has"
        )
    s, positions = m.Sizes.of(ini, "gpt"), ini.size("gpt", "max_pos_seq_len")
    config = _common(ini, "gpt", s) | {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "ffn_dim": s.ffn,
        "max_position_embeddings": positions,
        "activation_function": "relu",
        "do_layer_norm_before": order == "pre_layernorm",
    }
    # OPT-350m's projections are multiplied into its embedding and its head, which then differ.
    table: Table = {
        "decoder.embed_tokens.weight": Bins("model.wte", (s.vocab, s.hidden)),
        "decoder.embed_positions.weight": Bins("model.wpe", (positions, s.hidden), view=m.from_two),
        "lm_head.weight": Bins("model.lm_head.weight", (s.vocab, s.hidden)),
    }
    if ini.flag("gpt", "has_post_decoder_layernorm", True):
        table |= m.norm("decoder.final_layer_norm", "model.final_layernorm", s.hidden)
    for i in range(s.layers):
        own, at = f"decoder.layers.{i}.", f"model.layers.{i}."
        table |= (
            m.norm(f"{own}self_attn_layer_norm", f"{at}input_layernorm", s.hidden)
            | m.norm(f"{own}final_layer_norm", f"{at}post_attention_layernorm", s.hidden)
            | m.separate_qkv(s, f"{own}self_attn", at, bias=True)
            | m.second(f"{own}self_attn.out_proj", f"{at}attention.dense", (s.hidden, s.hidden))
            | m.first(f"{own}fc1", f"{at}mlp.dense_h_to_4h", (s.hidden, s.ffn))
            | m.second(f"{own}fc2", f"{at}mlp.dense_4h_to_h", (s.ffn, s.hidden))
        )
    return _decoder(ini, "gpt", config, table, ignored=_INT8)


def _bloom(ini: Ini) -> Layout:
    ini.forbid(
        "gpt",
        layernorm_type="pre_layernorm",
        activation_type="Gelu",
        has_pre_decoder_layernorm=True,
        has_post_decoder_layernorm=True,
    )
    if ini.flag("gpt", "has_positional_encoding", True):
        raise UnsupportedModelError(
            f"{ini.path}: [gpt] has_positional_encoding is true beside use_attention_linear_bias; "
            "BLOOM has one of them"
        )
    s = m.Sizes.of(ini, "gpt")
    if s.ffn != 4 * s.hidden:
        raise UnsupportedModelError(
            f"{ini.path}: [gpt] inter_size is {s.ffn}; BLOOM's is {4 * s.hidden}, 4 x hidden"
        )
    config = _common(ini, "gpt", s) | {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": s.hidden,
        "n_layer": s.layers,
        "n_head": s.heads,
        "layer_norm_epsilon": ini.number("gpt", "layernorm_eps", 1e-5),
    }
    norm = "pre_decoder_layernorm"
    table: Table = {"word_embeddings.weight": Bins("model.wte", (s.vocab, s.hidden))}
    table |= m.norm("word_embeddings_layernorm", f"model.{norm}", s.hidden)
    table |= m.norm("ln_f", "model.final_layernorm", s.hidden)
    table["lm_head.weight"] = Bins("model.lm_head.weight", (s.vocab, s.hidden))
    for i in range(s.layers):
        own, at = f"h.{i}.", f"model.layers.{i}."
        table |= m.megatron_layer(s, own, at, "self_attention")
    return _decoder(ini, "gpt", config, table)


def gptj(ini: Ini) -> Layout:
    """GPT-J."""
    ini.forbid("gptj", num_tasks=0)
    s = m.Sizes.of(ini, "gptj")
    config = _common(ini, "gptj", s) | {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "n_embd": s.hidden,
        "n_layer": s.layers,
        "n_head": s.heads,
        "n_inner": s.ffn,
        "rotary_dim": ini.size("gptj", "rotary_embedding"),
        "activation_function": "gelu_new",
    }
    table: Table = {
        "wte.weight": Bins("model.wte", (s.vocab, s.hidden)),
        "lm_head.weight": Bins("model.lm_head.weight", (s.vocab, s.hidden)),
        "lm_head.bias": Bins("model.lm_head.bias", (s.vocab,)),
    } | m.norm("ln_f", "model.final_layernorm", s.hidden)
    for i in range(s.layers):
        own, at = f"h.{i}.", f"model.layers.{i}."
        dense = f"{at}attention.dense.weight"
        table |= (
            m.norm(f"{own}ln_1", f"{at}input_layernorm", s.hidden)
            | m.separate_qkv(s, f"{own}attn", at, bias=False)
            | {f"{own}attn.out_proj.weight": Bins(dense, (s.hidden, s.hidden), 0, transposed)}
            | m.first(f"{own}mlp.fc_in", f"{at}mlp.dense_h_to_4h", (s.hidden, s.ffn))
            | m.second(f"{own}mlp.fc_out", f"{at}mlp.dense_4h_to_h", (s.ffn, s.hidden))
        )
    return _decoder(ini, "gptj", config, table, optional=())


def gptneox(ini: Ini) -> Layout:
    """GPT-NeoX."""
    ini.forbid("gptneox", num_tasks=0)
    s = m.Sizes.of(ini, "gptneox")
    config = _common(ini, "gptneox", s) | {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "intermediate_size": s.ffn,
        "rotary_pct": _fraction(ini.size("gptneox", "rotary_embedding"), s.head_dim),
        "use_parallel_residual": ini.flag("gptneox", "use_gptj_residual", True),
        "hidden_act": "gelu",
    }
    table: Table = {
        "embed_in.weight": Bins("model.wte", (s.vocab, s.hidden)),
        "embed_out.weight": Bins("model.lm_head.weight", (s.vocab, s.hidden)),
    } | m.norm("final_layer_norm", "model.final_layernorm", s.hidden)
    for i in range(s.layers):
        at = f"model.layers.{i}."
        table |= m.megatron_layer(s, f"layers.{i}.", at, "attention", divided=True)
    return _decoder(
        ini,
        "gptneox",
        config,
        table,
        optional=(),
        # The sum of two biases that are there one by one as well.
        ignored=("model.layers.*.mlp.attention.bias.sum.bin",),
    )


_INT8 = (
    "model.layers.*.weight.int8.*.bin",
    "model.layers.*.scale.bin",
    "model.layers.*.scale_inter.bin",
    "model.layers.*.scale_out.bin",
)


def _decoder(
    ini: Ini,
    section: str,
    config: dict[str, Any],
    table: Table,
    optional: tuple[str, ...] = ("lm_head.weight",),
    ignored: tuple[str, ...] = (),
) -> Layout:
    gpus = ini.whole(section, "tensor_para_size")
    return Layout(config, table, ini.dtype(section), gpus, optional, ignored)


def _fraction(part: int, whole: int) -> float:
    """A float whose product with `whole` is not below `part`."""
    result = part / whole
    return result if int(whole * result) >= part else math.nextafter(result, math.inf)
