"""OPT (Zhang et al., 2022); OPT-350m is post-norm and embeds into a narrower space."""

from __future__ import annotations

from lmi_multi.models.config import Config
from lmi_multi.models.family import Family, Weight, layers, weight
from lmi_multi.models.layouts import drop_two_rows
from lmi_multi.models.spec import Learned, ModelSpec


def _spec(c: Config) -> ModelSpec:
    c.forbid(layer_norm_elementwise_affine=True)
    hidden = c.integer("hidden_size")
    return ModelSpec(
        family="opt",
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        embed_dim=c.integer("word_embed_proj_dim", hidden),
        decoder_layers=c.integer("num_hidden_layers"),
        heads=c.integer("num_attention_heads"),
        ffn=c.integer("ffn_dim"),
        position=Learned(),
        max_positions=c.integer("max_position_embeddings", 2048),
        activation=c.activation("activation_function", "relu"),
        block="pre" if c.flag("do_layer_norm_before", True) else "post",
    )


def _weights(s: ModelSpec) -> dict[str, Weight]:
    projected = s.embed_dim != s.hidden
    top = {
        "embed": weight("decoder.embed_tokens"),
        "positions": weight("decoder.embed_positions", fix=drop_two_rows),
        "decoder.norm": weight("decoder.final_layer_norm", optional=True),
        "head": weight("lm_head", optional=True),
    }
    if projected:
        top |= {
            "project_in": weight("decoder.project_in"),
            "project_out": weight("decoder.project_out"),
        }
    return top | layers(
        "decoder",
        s.decoder_layers,
        "decoder.layers.{i}.",
        {
            "norm1": weight("self_attn_layer_norm"),
            "qkv": weight("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "out": weight("self_attn.out_proj"),
            "norm2": weight("final_layer_norm"),
            "up": weight("fc1"),
            "down": weight("fc2"),
        },
    )


OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM", "OPTModel"),
    spec=_spec,
    weights=_weights,
    base="model.",
)
