"""A small Llama and T5 checkpoint written without transformers, for tests that break them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


def llama_state(config: dict[str, Any] = LLAMA, seed: int = 0) -> State:
    """Random fp32 weights of `config`, with a head of its own."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    state = {
        "model.embed_tokens.weight": draw(vocab, hidden),
        "model.norm.weight": draw(hidden),
        "lm_head.weight": draw(vocab, hidden),
    }
    for i in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, shape in shapes.items():
            state[f"model.layers.{i}.{name}.weight"] = draw(*shape)
    return state


def t5_config(**changes: Any) -> dict[str, Any]:
    """A T5 of one layer a stack."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 23,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 1,
        "num_heads": 2,
    } | changes


def t5_state(seed: int = 0) -> State:
    """Random fp32 weights of `t5_config()`, without a head."""
    random = torch.Generator().manual_seed(seed)
    attention = dict.fromkeys("qkvo", (8, 8))
    state: dict[str, tuple[int, ...]] = {"shared": (23, 8)}
    for stack in ("encoder", "decoder"):
        cross = stack == "decoder"
        block = f"{stack}.block.0.layer."
        state[f"{stack}.final_layer_norm"] = (8,)
        state[f"{block}0.SelfAttention.relative_attention_bias"] = (32, 2)
        for part, shape in attention.items():
            state[f"{block}0.SelfAttention.{part}"] = shape
            if cross:
                state[f"{block}1.EncDecAttention.{part}"] = shape
        for layer in range(3 if cross else 2):
            state[f"{block}{layer}.layer_norm"] = (8,)
        state[f"{block}{2 if cross else 1}.DenseReluDense.wi"] = (12, 8)
        state[f"{block}{2 if cross else 1}.DenseReluDense.wo"] = (8, 12)
    return {f"{name}.weight": torch.randn(s, generator=random) for name, s in state.items()}


def write(folder: Path, state: State, config: dict[str, Any] = LLAMA) -> Path:
    """Save `state` as one safetensors file beside `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, state: State, suffix: str, shards: int = 3) -> Path:
    """Save `state` over several files with an index, as safetensors or as .bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: state[name] for name in list(state)[number::shards]}
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path
