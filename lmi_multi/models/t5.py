"""T5, T5 v1.1, FLAN-T5, UL2, mT5 (Raffel et al., 2019; Xue et al., 2020) and UMT5."""

from __future__ import annotations

from lmi_multi.errors import CheckpointError, UnsupportedModelError
from lmi_multi.models.config import ACTIVATIONS, Config
from lmi_multi.models.family import Family, Weight, layers, weight
from lmi_multi.models.spec import ModelSpec, RelativeBias


def _spec(c: Config) -> ModelSpec:
    hidden = c.integer("d_model", least=1)
    encoder_layers = c.integer("num_layers", least=1)
    mt5, umt5 = (c.architecture.startswith(name) for name in ("MT5", "UMT5"))
    projection = c.text("feed_forward_proj", "gated-gelu" if umt5 else "relu")
    gate, _, activation = projection.rpartition("-")
    if gate not in ("", "gated"):
        raise CheckpointError(
            f"config.json: feed_forward_proj is {projection!r}, "
            "must be ACTIVATION or gated-ACTIVATION"
        )
    if projection == "gated-gelu":  # v1.1 means the tanh form by this name
        activation = "gelu_new"
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: feed_forward_proj is {projection!r}; supported activations: "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    # transformers 5 forces tie_word_embeddings to True and keeps the truth in the other flag. No
    # mT5 was trained with scaled logits, and transformers 5 never scales them.
    scaled = c.flag("scale_decoder_outputs", not mt5 and c.flag("tie_word_embeddings", True))
    return ModelSpec(
        family="t5",
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        encoder_layers=encoder_layers,
        decoder_layers=c.integer("num_decoder_layers", encoder_layers, least=1),
        heads=c.integer("num_heads"),
        head_dim=c.integer("d_kv", least=1),
        ffn=c.integer("d_ff"),
        position=RelativeBias(
            buckets=c.integer("relative_attention_num_buckets", 32),
            max_distance=c.integer("relative_attention_max_distance", 128),
            per_layer=umt5,
        ),
        norm="rms",
        norm_eps=c.number("layer_norm_epsilon", 1e-6),
        activation=ACTIVATIONS[activation],
        gated=gate == "gated",
        attention_scale=1.0,
        logit_scale=hidden**-0.5 if scaled else 1.0,
        wide_residual=True,
    )


def _stack(s: ModelSpec, stack: str, count: int) -> dict[str, Weight]:
    """One stack's table; the decoder has cross-attention between self-attention and FFN."""
    decoder = stack == "decoder"
    ffn = f"layer.{2 if decoder else 1}"
    up = ("wi_0", "wi_1") if s.gated else ("wi",)
    relative = weight("layer.0.SelfAttention.relative_attention_bias")
    table = {
        "norm1": weight("layer.0.layer_norm"),
        "qkv": weight(*(f"layer.0.SelfAttention.{part}" for part in "qkv")),
        "out": weight("layer.0.SelfAttention.o"),
        "norm2": weight(f"{ffn}.layer_norm"),
        "up": weight(*(f"{ffn}.DenseReluDense.{part}" for part in up)),
        "down": weight(f"{ffn}.DenseReluDense.wo"),
    }
    if decoder:
        table |= {
            "cross_norm": weight("layer.1.layer_norm"),
            "cross_q": weight("layer.1.EncDecAttention.q"),
            "cross_kv": weight("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
            "cross_out": weight("layer.1.EncDecAttention.o"),
        }
    prefix = f"{stack}.block.{{i}}."
    shared = {"relative": relative}
    every = shared if isinstance(s.position, RelativeBias) and s.position.per_layer else {}
    return (
        {f"{stack}.norm": weight(f"{stack}.final_layer_norm")}
        | layers(stack, 1, prefix, shared)
        | layers(stack, count, prefix, table | every)
    )


def _weights(s: ModelSpec) -> dict[str, Weight]:
    return (
        {"embed": weight("shared"), "head": weight("lm_head", optional=True)}
        | _stack(s, "encoder", s.encoder_layers)
        | _stack(s, "decoder", s.decoder_layers)
    )


T5 = Family(
    name="t5",
    architectures=(
        "T5ForConditionalGeneration",
        "T5WithLMHeadModel",
        "MT5ForConditionalGeneration",
        "UMT5ForConditionalGeneration",
    ),
    spec=_spec,
    weights=_weights,
    ignored=(
        # Copies of `shared`, and a bias that the first T5 checkpoints carry but never used.
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    # safetensors stores tensors that share memory once, under any of their names.
    aliases=(("shared", ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),),
)
