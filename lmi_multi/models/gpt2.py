"""GPT-2 (Radford et al., 2019)."""

from __future__ import annotations

from lmi_multi.models.config import Config
from lmi_multi.models.family import Family, Weight, layers, weight
from lmi_multi.models.layouts import transpose
from lmi_multi.models.spec import Learned, ModelSpec


def _spec(c: Config) -> ModelSpec:
    c.forbid(add_cross_attention=False)
    hidden = c.integer("n_embd")
    return ModelSpec(
        family="gpt2",
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        decoder_layers=c.integer("n_layer"),
        heads=c.integer("n_head"),
        ffn=c.integer("n_inner", 4 * hidden),
        position=Learned(),
        max_positions=c.integer("n_positions", 1024),
        norm_eps=c.number("layer_norm_epsilon", 1e-5),
        activation=c.activation("activation_function", "gelu_new"),
        attention_scale=0.0 if c.flag("scale_attn_weights", True) else 1.0,
        inverse_layer_scale=c.flag("scale_attn_by_inverse_layer_idx", False),
    )


def _weights(s: ModelSpec) -> dict[str, Weight]:
    return {
        "embed": weight("wte"),
        "positions": weight("wpe"),
        "decoder.norm": weight("ln_f"),
        "head": weight("lm_head", optional=True),
    } | layers(
        "decoder",
        s.decoder_layers,
        "h.{i}.",
        {
            "norm1": weight("ln_1"),
            "qkv": weight("attn.c_attn", fix=transpose),
            "out": weight("attn.c_proj", fix=transpose),
            "norm2": weight("ln_2"),
            "up": weight("mlp.c_fc", fix=transpose),
            "down": weight("mlp.c_proj", fix=transpose),
        },
    )


GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    spec=_spec,
    weights=_weights,
    base="transformer.",
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
)
