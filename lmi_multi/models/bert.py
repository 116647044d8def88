"""BERT (Devlin et al., 2018): the encoder's output; the pooler is kept, task heads are not."""

from __future__ import annotations

from lmi_multi.models.config import Config
from lmi_multi.models.family import Family, Weight, layers, weight
from lmi_multi.models.spec import Learned, ModelSpec


def _spec(c: Config) -> ModelSpec:
    c.forbid(is_decoder=False, position_embedding_type="absolute")
    return ModelSpec(
        family="bert",
        vocab=c.integer("vocab_size"),
        hidden=c.integer("hidden_size"),
        encoder_layers=c.integer("num_hidden_layers"),
        heads=c.integer("num_attention_heads"),
        ffn=c.integer("intermediate_size"),
        position=Learned(),
        max_positions=c.integer("max_position_embeddings", 512),
        segments=c.integer("type_vocab_size", 2),
        norm_eps=c.number("layer_norm_eps", 1e-12),
        activation=c.activation("hidden_act", "gelu"),
        block="post",
    )


def _weights(s: ModelSpec) -> dict[str, Weight]:
    return {
        "embed": weight("embeddings.word_embeddings"),
        "positions": weight("embeddings.position_embeddings"),
        "segments": weight("embeddings.token_type_embeddings"),
        "embed_norm": weight("embeddings.LayerNorm"),
        "pooler": weight("pooler.dense", optional=True),
    } | layers(
        "encoder",
        s.encoder_layers,
        "encoder.layer.{i}.",
        {
            "qkv": weight("attention.self.query", "attention.self.key", "attention.self.value"),
            "out": weight("attention.output.dense"),
            "norm1": weight("attention.output.LayerNorm"),
            "up": weight("intermediate.dense"),
            "down": weight("output.dense"),
            "norm2": weight("output.LayerNorm"),
        },
    )


BERT = Family(
    name="bert",
    architectures=(
        "BertModel",
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForSequenceClassification",
    ),
    spec=_spec,
    weights=_weights,
    base="bert.",
    ignored=(r"(cls|classifier)\..*", r"embeddings\.position_ids"),
    renames=((".gamma", ".weight"), (".beta", ".bias")),
)
