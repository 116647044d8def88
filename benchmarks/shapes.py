"""Models of true sizes with random weights: nothing is downloaded, and nothing is learned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A transformers class, its config class, and the sizes that differ from its defaults."""

    model: str
    config: str
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype, device: str) -> Any:
        """The model with random weights of fixed seed, and without an end token.

        No end token: an answer has exactly the length asked for, and no contender pays for
        suppressing one.
        """
        config = getattr(transformers, self.config)(
            **self.sizes, eos_token_id=None, bos_token_id=None, pad_token_id=0
        )
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return getattr(transformers, self.model)(config).eval()
        finally:
            torch.set_default_dtype(before)


def _t5(hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> Shape:
    sizes = {"d_model": hidden, "d_ff": ffn, "num_layers": layers, "num_heads": heads, "d_kv": 64}
    return Shape(
        "T5ForConditionalGeneration",
        "T5Config",
        {**sizes, "vocab_size": 32128, "decoder_start_token_id": 0, **more},
    )


def _flan(hidden: int, ffn: int, layers: int, heads: int) -> Shape:
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return _t5(hidden, ffn, layers, heads, **gated)


SHAPES = {
    "t5-small": _t5(512, 2048, 6, 8),
    "gpt2": Shape("GPT2LMHeadModel", "GPT2Config"),
    "flan-t5-base": _flan(768, 2048, 12, 12),
    "flan-t5-xxl": _flan(4096, 10240, 24, 64),
    "gpt-j-6b": Shape("GPTJForCausalLM", "GPTJConfig"),
    "opt-1.3b": Shape(
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32}
        | {"ffn_dim": 8192, "word_embed_proj_dim": 2048},
    ),
    "llama-2-7b": Shape("LlamaForCausalLM", "LlamaConfig", {"max_position_embeddings": 4096}),
    # To try the harness itself.
    "tiny-t5": _t5(64, 128, 2, 4, vocab_size=512, d_kv=16),
    "tiny-gpt2": Shape(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512},
    ),
}


def checkpoint(name: str, dtype: str, device: str, work: Path) -> Path:
    """The folder in `work` with shape `name` as a checkpoint; made if it is not there yet."""
    folder = work / f"{name}-{dtype}"
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        SHAPES[name].build(DTYPES[dtype], device).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process made it in the meantime
            shutil.rmtree(partial)
    return folder


def prompts(vocab: int, batch: int, length: int) -> list[list[int]]:
    """`batch` prompts of `length` random token ids, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(2, vocab, (batch, length), generator=generator).tolist()
    return ids
