"""Tiny random checkpoints of every family: one config each, with the shapes that break splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 101
transformers.logging.set_verbosity_error()


@dataclass(frozen=True)
class Tiny:
    """A transformers class and config; `degrees` are tensor-parallel degrees that it allows."""

    model: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    degrees: tuple[int, ...] = (1, 2)
    untie: bool = False  # transformers 5 ties T5's head whatever the config says
    std: float = 0.15  # of the weights: about the inverse root of the hidden size

    def build(self, seed: int = 0, vocab: int = VOCAB) -> PreTrainedModel:
        """The model with random float32 weights, large enough for greedy ties to be rare.

        T5 has no attention scale: its queries are small instead, as they are when trained.
        """
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(
            vocab_size=vocab, bos_token_id=1, eos_token_id=2, pad_token_id=0, **self.settings
        )
        model: PreTrainedModel = getattr(transformers, self.model)(config).eval().float()
        if self.untie:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for name, parameter in model.named_parameters():
            norm = "norm" in name or "ln_" in name or "LayerNorm" in name
            query = name.endswith("Attention.q.weight")
            std = 0.3 if norm else self.std / config.d_kv**0.5 if query else self.std
            mean = 1.0 if norm and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=std)
        return model

    def save(self, folder: Path, seed: int = 0, vocab: int = VOCAB) -> PreTrainedModel:
        """Write the checkpoint as transformers does, and return the model."""
        model = self.build(seed, vocab)
        model.save_pretrained(folder)
        return model


def _gpt(**settings: Any) -> dict[str, Any]:
    return {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128} | settings


def _t5(**settings: Any) -> dict[str, Any]:
    sizes = {"d_model": 40, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3}
    return sizes | {"num_heads": 4, "decoder_start_token_id": 0} | settings


def _opt(**settings: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96}
    return sizes | {"max_position_embeddings": 128, "word_embed_proj_dim": 48} | settings


def _neox(**settings: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sizes | {"intermediate_size": 96, "max_position_embeddings": 128} | settings


def _llama(**settings: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sizes | {"intermediate_size": 96, "max_position_embeddings": 256} | settings


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILIES: dict[str, Tiny] = {
    "t5": Tiny("T5ForConditionalGeneration", "T5Config", _t5(), (1, 2, 4)),
    "t5-gated-untied": Tiny(
        "T5ForConditionalGeneration",
        "T5Config",
        _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        (1, 2, 4),
        untie=True,
    ),
    "mt5": Tiny(
        "MT5ForConditionalGeneration",
        "MT5Config",
        _t5(feed_forward_proj="gated-gelu"),
        (1, 2),
        untie=True,
    ),
    "umt5": Tiny("UMT5ForConditionalGeneration", "UMT5Config", _t5(), (1, 2, 4)),
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", _gpt(), (1, 2, 4)),
    "gpt2-inverse-scale": Tiny(
        "GPT2LMHeadModel",
        "GPT2Config",
        _gpt(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    ),
    "opt": Tiny("OPTForCausalLM", "OPTConfig", _opt(), (1, 2, 4)),
    "opt-350m": Tiny(
        "OPTForCausalLM",
        "OPTConfig",
        _opt(do_layer_norm_before=False, word_embed_proj_dim=32),
        (1, 2, 4),
    ),
    "opt-unbiased": Tiny("OPTForCausalLM", "OPTConfig", _opt(enable_bias=False)),
    "bloom": Tiny(
        "BloomForCausalLM", "BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}
    ),
    "bloom-12-heads": Tiny(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 96, "n_layer": 2, "n_head": 12},
        (1, 2, 4),
    ),
    "gptj": Tiny("GPTJForCausalLM", "GPTJConfig", _gpt(n_embd=64, rotary_dim=8), (1, 2, 4)),
    "gptneox": Tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", _neox(), (1, 2, 4)),
    "gptneox-sequential": Tiny(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _neox(use_parallel_residual=False, attention_bias=False),
    ),
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", _llama(hidden_size=64), (1, 2, 4)),
    "llama-gqa": Tiny(
        "LlamaForCausalLM",
        "LlamaConfig",
        _llama(num_attention_heads=9, num_key_value_heads=3, head_dim=8, intermediate_size=96),
        (1, 3),
    ),
    "llama-mqa-biased-tied": Tiny(
        "LlamaForCausalLM",
        "LlamaConfig",
        _llama(
            num_key_value_heads=1,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
        (1, 2, 4),
    ),
    "llama3-rope": Tiny(
        "LlamaForCausalLM", "LlamaConfig", _llama(head_dim=16, rope_parameters=LLAMA3)
    ),
    "llama-linear-rope": Tiny(
        "LlamaForCausalLM",
        "LlamaConfig",
        _llama(
            head_dim=16,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        ),
    ),
    "llama-yarn-rope": Tiny(
        "LlamaForCausalLM", "LlamaConfig", _llama(head_dim=16, rope_parameters=YARN)
    ),
    "mistral-window": Tiny(
        "MistralForCausalLM",
        "MistralConfig",
        _llama(head_dim=16, num_key_value_heads=2, sliding_window=7),
    ),
    "qwen2": Tiny(
        "Qwen2ForCausalLM", "Qwen2Config", _llama(hidden_size=64, num_key_value_heads=2), (1, 2, 4)
    ),
    "qwen2-window": Tiny(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _llama(
            hidden_size=64,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
        ),
    ),
    "qwen3": Tiny(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _llama(num_key_value_heads=2, head_dim=16),
        (1, 2, 4),
    ),
    "bert": Tiny(
        "BertModel",
        "BertConfig",
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 64,
        },
        (1, 2, 4),
    ),
}

GENERATORS = [name for name in FAMILIES if name != "bert"]
ENCODERS = [name for name in FAMILIES if name == "bert" or "t5" in name]
