"""Config files and checkpoints as they are found: old spellings, odd names, wrong values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.errors import CheckpointError, UnsupportedModelError
from lmi_multi.models.config import Config
from lmi_multi.models.registry import FAMILIES as REGISTERED
from lmi_multi.models.registry import family_of
from lmi_multi.models.spec import Learned, ModelSpec, Rope, RopeScaling
from tests.families import FAMILIES
from tests.tiny_models import checkpoint

# One configuration a family, with nothing but what its file must hold.
LEAST: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": {
        "vocab_size": 9,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 2,
        "num_heads": 2,
    },
    "GPT2LMHeadModel": {"vocab_size": 9, "n_embd": 8, "n_layer": 2, "n_head": 2},
    "GPTJForCausalLM": {"vocab_size": 9, "n_embd": 8, "n_layer": 2, "n_head": 2},
    "OPTForCausalLM": {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 12,
    },
    "BloomForCausalLM": {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
} | {
    name: {
        "vocab_size": 9,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    for name in ("GPTNeoXForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "BertModel")
}


def spec_of(architecture: str, **changes: Any) -> ModelSpec:
    fields = {"architectures": [architecture], **LEAST[architecture], **changes}
    return family_of(architecture).spec(Config(fields))


# --- config.json


def test_an_unknown_architecture() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        family_of("FalconForCausalLM")
    message = str(caught.value)
    assert message.startswith("architecture 'FalconForCausalLM' is not supported; known: ")
    for family in REGISTERED:
        assert all(name in message for name in family.architectures)


@pytest.mark.parametrize("architecture", LEAST)
def test_every_field_is_checked(architecture: str) -> None:
    """Missing, null, of another type, negative or zero: the error names the field."""
    spec_of(architecture)
    for name in LEAST[architecture]:
        for wrong in (None, "8", 8.0, True, [8], {}, -1):
            with pytest.raises(CheckpointError, match=rf"config\.json: {name} is"):
                spec_of(architecture, **{name: wrong})
        with pytest.raises(CheckpointError, match=r"is 0, must be at least 1|no layers"):
            spec_of(architecture, **{name: 0})


@pytest.mark.parametrize(
    ("architecture", "field", "wrong"),
    [
        ("GPT2LMHeadModel", "layer_norm_epsilon", "1e-5"),
        ("GPT2LMHeadModel", "layer_norm_epsilon", float("nan")),
        ("GPT2LMHeadModel", "scale_attn_weights", "no"),
        ("GPT2LMHeadModel", "n_positions", 3.5),
        ("LlamaForCausalLM", "rms_norm_eps", [1e-6]),
        ("LlamaForCausalLM", "rms_norm_eps", 10**400),
        ("LlamaForCausalLM", "rope_theta", float("inf")),
        ("LlamaForCausalLM", "rope_scaling", "linear"),
        ("LlamaForCausalLM", "rope_parameters", [1]),
        ("LlamaForCausalLM", "hidden_act", 3),
        ("T5ForConditionalGeneration", "feed_forward_proj", "gated"),
        ("T5ForConditionalGeneration", "feed_forward_proj", "double-gated-gelu"),
        ("T5ForConditionalGeneration", "num_decoder_layers", -2),
    ],
)
def test_optional_fields_are_checked(architecture: str, field: str, wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} is"):
        spec_of(architecture, **{field: wrong})


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("GPT2LMHeadModel", "add_cross_attention", True),
        ("GPT2LMHeadModel", "activation_function", "mish"),
        ("BertModel", "is_decoder", True),
        ("BertModel", "position_embedding_type", "relative_key"),
        ("BloomForCausalLM", "apply_residual_connection_post_layernorm", True),
        ("OPTForCausalLM", "layer_norm_elementwise_affine", False),
        ("T5ForConditionalGeneration", "feed_forward_proj", "gated-mish"),
        ("Qwen2ForCausalLM", "layer_types", ["full_attention", "chunked_attention"]),
        ("Qwen2ForCausalLM", "layer_types", "full_attention"),
    ],
)
def test_unsupported_settings(architecture: str, field: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(architecture, **{field: value, "use_sliding_window": True})
    assert f"config.json: {field} is {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope type is 'longrope'; supported: default, "),
        ({"type": "su"}, "rope type is 'su'"),
        ({"type": "linear"}, "factor is missing"),
        ({"type": "dynamic", "factor": 0.5}, "rope factor is 0.5, must be at least 1"),
        ({"rope_type": "linear", "factor": "4"}, "factor is '4', must be float"),
        ({"full_attention": {"rope_theta": 1e4}}, "settings of its own for full_attention"),
        ({"rope_theta": 0.0}, "rope theta is 0.0"),
        ({"partial_rotary_factor": 2.0}, "rotary dim is 32"),
        ({"partial_rotary_factor": 0.2}, "rotary dim is 3, must be even"),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 0},
            "original_max_position_embeddings is 0",
        ),
    ],
)
def test_rope_settings_that_cannot_be(rope: dict[str, Any], message: str) -> None:
    for spelling in ("rope_scaling", "rope_parameters"):
        with pytest.raises(CheckpointError, match=message):
            spec_of("LlamaForCausalLM", **{spelling: rope})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"type": "linear", "factor": 2.0},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2},
        ),
        (
            {"rope_type": "dynamic", "factor": 4.0},
            {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 4.0},
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {
                "rope_type": "yarn",
                "rope_theta": 5e5,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": None,
                "beta_fast": 32,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_both_spellings_of_rope_agree(old: dict[str, Any], new: dict[str, Any]) -> None:
    name = "LlamaForCausalLM"
    before = spec_of(name, rope_theta=5e5, rope_scaling=old or None, max_position_embeddings=64)
    after = spec_of(name, rope_parameters=new, max_position_embeddings=64)
    assert before == after and isinstance(after.position, Rope) and after.position.theta == 5e5


def test_where_bloom_and_mistral_differ_from_their_names() -> None:
    bloom = spec_of("BloomForCausalLM", n_embed=16, n_layer=3, n_head=4)
    assert (bloom.hidden, bloom.decoder_layers, bloom.heads, bloom.ffn) == (16, 3, 4, 64)
    fields = LEAST["LlamaForCausalLM"] | {"architectures": ["MistralForCausalLM"]}
    fields |= {"num_key_value_heads": 2}
    silent, none, set_ = (
        family_of("MistralForCausalLM").spec(Config(fields | change)).windows
        for change in ({}, {"sliding_window": None}, {"sliding_window": 7})
    )
    assert (silent, none, set_) == ((4096, 4096), (), (7, 7))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "\xff", '{"architectures": "GPT2LMHeadModel"}']
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = Config.read(tmp_path).architecture


# --- spec


@pytest.mark.parametrize("family", FAMILIES)
def test_specs_survive_json(family: str, checkpoints: Path) -> None:
    config = Config.read(checkpoint(checkpoints, family))
    spec = family_of(config.architecture).spec(config)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_from_dict_refuses() -> None:
    data = spec_of("LlamaForCausalLM").to_dict()
    with pytest.raises(CheckpointError, match="unknown fields: experts, router"):
        ModelSpec.from_dict(data | {"router": 1, "experts": 8})
    with pytest.raises(CheckpointError, match="spec field hidden"):
        ModelSpec.from_dict(data | {"hidden": "wide"})
    with pytest.raises(CheckpointError, match="heads is 0, must be at least 1"):
        ModelSpec.from_dict(data | {"heads": 0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "must be a multiple of kv_heads"),
        ({"hidden": 3, "head_dim": 0}, "3 features do not make 4 heads"),
        ({"decoder_layers": 0}, "no layers"),
        ({"decoder_layers": -1}, "decoder_layers is -1"),
        ({"windows": (4,)}, "windows has 1 entries for 2 decoder layers"),
        ({"position": Rope(dim=34)}, "rotary dim is 34"),
        (
            {
                "position": Rope(
                    dim=2, scaling=RopeScaling(type="dynamic", factor=2, original_max=8)
                )
            },
            "at least 4",
        ),
    ],
)
def test_inconsistent_specs(changes: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"family": "x", "vocab": 9, "hidden": 32, "heads": 4, "ffn": 8}
    with pytest.raises(CheckpointError, match=message):
        ModelSpec(**{**sizes, "decoder_layers": 2, "position": Learned(), **changes})


# --- names of old checkpoints


def same_tensors(left: Artifact, right: Artifact) -> bool:
    mine, theirs = left.load_rank(0, 1), right.load_rank(0, 1)
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in mine.items())


def without_prefix(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def gamma_beta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
    }


def bert_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    head = {"cls.predictions.bias": torch.zeros(101), "cls.seq_relationship.weight": torch.ones(2)}
    ids = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    return {f"bert.{name}": tensor for name, tensor in gamma_beta(state).items()} | head | ids


def t5_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    shared = state["shared.weight"]
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    )
    return state | {name: shared.clone() for name in copies} | {unused: torch.ones(32, 4)}


def gpt2_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones(1, 1, 128, 128).tril().to(torch.uint8)
    buffers = {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(2)}
    masked = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    head = {"lm_head.weight": state["transformer.wte.weight"].clone()}
    return state | buffers | masked | head


def neox_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers writes `embed_out`, and calls the same module `lm_head` in memory."""
    assert "embed_out.weight" in state
    return {name.replace("embed_out", "lm_head"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        ("gpt2", without_prefix("transformer.")),
        ("gpt2", gpt2_buffers),
        ("bert", gamma_beta),
        ("bert", bert_prefix),
        ("t5", t5_copies),
        ("gptneox", neox_head),
        ("llama", without_prefix("model.")),
        ("bloom", without_prefix("transformer.")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_old_names(
    family: str,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    checkpoints: Path,
    tmp_path: Path,
) -> None:
    source = checkpoint(checkpoints, family)
    state = load_file(source / "model.safetensors")
    renamed = {name: tensor.contiguous() for name, tensor in rename(state).items()}
    assert renamed.keys() != state.keys()
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((source / "config.json").read_text())
    save_file(renamed, old / "model.safetensors")
    assert same_tensors(convert(old, tmp_path / "a"), convert(source, tmp_path / "b"))
