"""GPT-NeoX and Pythia (Black et al., 2022; Biderman et al., 2023)."""

from __future__ import annotations

from lmi_multi.models.config import Config
from lmi_multi.models.family import Family, Weight, layers, weight
from lmi_multi.models.layouts import split_heads_qkv
from lmi_multi.models.spec import ModelSpec


def _spec(c: Config) -> ModelSpec:
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads", least=1)
    rope = c.rope(
        hidden // heads,
        partial=c.number("rotary_pct", 0.25),
        theta=c.number("rotary_emb_base", 10_000.0),
    )
    return ModelSpec(
        family="gptneox",
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        decoder_layers=c.integer("num_hidden_layers"),
        heads=heads,
        ffn=c.integer("intermediate_size"),
        position=rope,
        max_positions=c.context(rope),
        norm_eps=c.number("layer_norm_eps", 1e-5),
        activation=c.activation("hidden_act", "gelu"),
        block="parallel" if c.flag("use_parallel_residual", True) else "pre",
    )


def _weights(s: ModelSpec) -> dict[str, Weight]:
    return {
        "embed": weight("embed_in"),
        "decoder.norm": weight("final_layer_norm"),
        "head": weight("embed_out", optional=True),
    } | layers(
        "decoder",
        s.decoder_layers,
        "layers.{i}.",
        {
            "norm1": weight("input_layernorm"),
            "qkv": weight("attention.query_key_value", fix=split_heads_qkv),
            "out": weight("attention.dense"),
            "norm2": weight("post_attention_layernorm"),
            "up": weight("mlp.dense_h_to_4h"),
            "down": weight("mlp.dense_4h_to_h"),
        },
    )


GPT_NEOX = Family(
    name="gptneox",
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    spec=_spec,
    weights=_weights,
    base="gpt_neox.",
    ignored=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    renames=(("lm_head.weight", "embed_out.weight"),),
)
