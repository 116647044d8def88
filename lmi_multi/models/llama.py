"""The Llama shape: Llama 1 to 3, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from lmi_multi.errors import UnsupportedModelError
from lmi_multi.models.config import Config
from lmi_multi.models.family import Family, Weight, layers, weight
from lmi_multi.models.spec import ModelSpec


def _windows(c: Config, count: int) -> tuple[int, ...]:
    """One sliding-window length a layer; empty when every layer attends to everything."""
    # Absent means transformers' default, null means none.
    length = c.integer("sliding_window", 0) if "sliding_window" in c.fields else 4096
    if c.architecture.startswith("Mistral"):
        return (length,) * count if length else ()
    if not c.flag("use_sliding_window", False) or not length:
        return ()
    first = c.integer("max_window_layers", 28)
    types = c.fields.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(count)
    ]
    lengths = {"sliding_attention": length, "full_attention": 0}
    if not isinstance(types, list) or not set(map(str, types)) <= set(lengths):
        raise UnsupportedModelError(
            f"config.json: layer_types is {types!r}; supported: a list of {', '.join(lengths)}"
        )
    return tuple(lengths[kind] for kind in types)


def _spec(c: Config) -> ModelSpec:
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads", least=1)
    mistral, qwen3 = (c.architecture.startswith(name) for name in ("Mistral", "Qwen3"))
    head_dim = c.integer("head_dim", 128 if qwen3 else hidden // heads)
    count = c.integer("num_hidden_layers", least=1)
    rope = c.rope(head_dim)
    return ModelSpec(
        family="llama",
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        decoder_layers=count,
        heads=heads,
        kv_heads=c.integer("num_key_value_heads", 8 if mistral else heads),
        head_dim=head_dim,
        ffn=c.integer("intermediate_size"),
        position=rope,
        max_positions=c.context(rope),
        norm="rms",
        norm_eps=c.number("rms_norm_eps", 1e-6),
        activation=c.activation("hidden_act", "silu"),
        gated=True,
        windows=_windows(c, count),
    )


def _weights(s: ModelSpec) -> dict[str, Weight]:
    return {
        "embed": weight("embed_tokens"),
        "decoder.norm": weight("norm"),
        "head": weight("lm_head", optional=True),
    } | layers(
        "decoder",
        s.decoder_layers,
        "layers.{i}.",
        {
            "norm1": weight("input_layernorm"),
            "qkv": weight("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "q_norm": weight("self_attn.q_norm", optional=True),
            "k_norm": weight("self_attn.k_norm", optional=True),
            "out": weight("self_attn.o_proj"),
            "norm2": weight("post_attention_layernorm"),
            "up": weight("mlp.gate_proj", "mlp.up_proj"),
            "down": weight("mlp.down_proj"),
        },
    )


LLAMA = Family(
    name="llama",
    architectures=(
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    ),
    spec=_spec,
    weights=_weights,
    base="model.",
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
