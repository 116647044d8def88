"""GPT-J (Wang and Komatsuzaki, 2021)."""

from __future__ import annotations

from lmi_multi.models.config import Config
from lmi_multi.models.family import Family, Weight, layers, weight
from lmi_multi.models.layouts import half_split_rope
from lmi_multi.models.spec import ModelSpec, Rope


def _spec(c: Config) -> ModelSpec:
    hidden, heads = c.integer("n_embd"), c.integer("n_head", least=1)
    return ModelSpec(
        family="gptj",
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        decoder_layers=c.integer("n_layer"),
        heads=heads,
        ffn=c.integer("n_inner", 4 * hidden),
        position=Rope(dim=c.integer("rotary_dim", hidden // heads)),
        max_positions=c.integer("n_positions", 2048),
        norm_eps=c.number("layer_norm_epsilon", 1e-5),
        activation=c.activation("activation_function", "gelu_new"),
        block="parallel",
    )


def _weights(s: ModelSpec) -> dict[str, Weight]:
    return {
        "embed": weight("wte"),
        "decoder.norm": weight("ln_f"),
        "head": weight("lm_head", optional=True),
    } | layers(
        "decoder",
        s.decoder_layers,
        "h.{i}.",
        {
            "norm1": weight("ln_1"),
            "qkv": weight("attn.q_proj", "attn.k_proj", "attn.v_proj", fix=half_split_rope),
            "out": weight("attn.out_proj"),
            "up": weight("mlp.fc_in"),
            "down": weight("mlp.fc_out"),
        },
    )


GPTJ = Family(
    name="gptj",
    architectures=("GPTJForCausalLM", "GPTJModel"),
    spec=_spec,
    weights=_weights,
    base="transformer.",
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
)
