"""Tiny random checkpoints of architectures that no family declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ByT5Tokenizer, PreTrainedModel

from tests.families import Tiny
from tests.tiny_models import BYTES

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}

FOREIGN = {
    "phi": Tiny("PhiForCausalLM", "PhiConfig", _SIZES),
    "falcon-alibi": Tiny(
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
    "gemma2-sliding": Tiny(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    ),
    "mixtral": Tiny(
        "MixtralForCausalLM",
        "MixtralConfig",
        _SIZES | {"num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "mamba-no-cache": Tiny(
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "bart": Tiny(
        "BartForConditionalGeneration", "BartConfig", _BART | {"decoder_start_token_id": 2}
    ),
    "marian": Tiny("MarianMTModel", "MarianConfig", _BART | {"decoder_start_token_id": 0}),
    "longt5": Tiny(
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
}


def foreign(folder: Path, name: str, tokenizer: bool = False) -> Path:
    """The checkpoint under `folder`, made once; on request with a byte tokenizer."""
    target = folder / f"foreign-{name}{'-bytes' if tokenizer else ''}"
    if not target.exists():
        FOREIGN[name].save(target, **({"vocab": BYTES} if tokenizer else {}))
        if tokenizer:
            ByT5Tokenizer(extra_ids=0).save_pretrained(target)
    return target


def reference(folder: Path) -> PreTrainedModel:
    """The same as transformers loads it: what is not stored, sinusoids for one, is as it means."""
    config = transformers.AutoConfig.from_pretrained(folder)
    [architecture] = config.architectures
    model: PreTrainedModel = getattr(transformers, architecture).from_pretrained(folder)
    return model.eval().float()


def greedy(model: PreTrainedModel, ids: list[int], length: int) -> list[int]:
    """What transformers generates."""
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    found = model.generate(
        given, attention_mask=mask, max_new_tokens=length, do_sample=False, num_beams=1
    )[0].tolist()
    return found[1:] if model.config.is_encoder_decoder else found[len(ids) :]
