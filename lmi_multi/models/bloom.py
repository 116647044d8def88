"""BLOOM (BigScience, 2022)."""

from __future__ import annotations

from lmi_multi.models.config import Config
from lmi_multi.models.family import Family, Weight, layers, weight
from lmi_multi.models.layouts import split_heads_qkv
from lmi_multi.models.spec import Alibi, ModelSpec


def _spec(c: Config) -> ModelSpec:
    c.forbid(apply_residual_connection_post_layernorm=False)
    hidden = c.integer(c.first("n_embed", "hidden_size"))
    return ModelSpec(
        family="bloom",
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        decoder_layers=c.integer(c.first("n_layer", "num_hidden_layers")),
        heads=c.integer(c.first("n_head", "num_attention_heads")),
        ffn=4 * hidden,
        position=Alibi(),
        norm_eps=c.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
    )


def _weights(s: ModelSpec) -> dict[str, Weight]:
    return {
        "embed": weight("word_embeddings"),
        "embed_norm": weight("word_embeddings_layernorm"),
        "decoder.norm": weight("ln_f"),
        "head": weight("lm_head", optional=True),
    } | layers(
        "decoder",
        s.decoder_layers,
        "h.{i}.",
        {
            "norm1": weight("input_layernorm"),
            "qkv": weight("self_attention.query_key_value", fix=split_heads_qkv),
            "out": weight("self_attention.dense"),
            "norm2": weight("post_attention_layernorm"),
            "up": weight("mlp.dense_h_to_4h"),
            "down": weight("mlp.dense_4h_to_h"),
        },
    )


BLOOM = Family(
    name="bloom",
    architectures=("BloomForCausalLM", "BloomModel"),
    spec=_spec,
    weights=_weights,
    base="transformer.",
)
