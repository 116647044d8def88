"""Writes Hugging Face models as FasterTransformer's converters do, with numpy alone.

Written from the format: matrices [in, out], q, k and v as [in, 3, out], outputs of a pair's first
matrix and inputs of its second shared out over the GPUs, every file raw and row-major.
"""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

Array = np.ndarray[Any, Any]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Writer:
    """The folder `N-gpu` under `root`."""

    def __init__(self, root: Path, gpus: int, dtype: str) -> None:
        self.folder = root / f"{gpus}-gpu"
        self.folder.mkdir(parents=True)
        self.gpus, self.dtype = gpus, dtype

    def one(self, name: str, array: Array) -> None:
        """A file of its own."""
        exact = torch.from_numpy(np.ascontiguousarray(array)).to(DTYPES[self.dtype])
        exact.view(torch.uint8).numpy().tofile(self.folder / f"{name}.bin")

    def split(self, name: str, array: Array, axis: int) -> None:
        """A file a GPU."""
        for rank, part in enumerate(np.split(array, self.gpus, axis=axis)):
            self.one(f"{name}.{rank}", part)

    def ini(self, sections: dict[str, dict[str, Any]]) -> None:
        """config.ini."""
        parser = configparser.ConfigParser(interpolation=None)
        for section, values in sections.items():
            parser[section] = {key: str(value) for key, value in values.items()}
        with (self.folder / "config.ini").open("w") as file:
            parser.write(file)


def write(model: PreTrainedModel, root: Path, gpus: int = 1, dtype: str = "fp32") -> Path:
    """The folder that holds `model`'s files."""
    writer = Writer(root, gpus, dtype)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    _FAMILIES[model.config.model_type](writer, model, state)
    return writer.folder


def _t5(w: Writer, model: Any, state: dict[str, Array]) -> None:
    sections: dict[str, dict[str, Any]] = {}
    for stack in ("encoder", "decoder"):
        values = getattr(model, stack).config.to_dict() | {"weight_data_type": w.dtype}
        buckets = values.pop("relative_attention_num_buckets")
        values["relative_attention_num_buckets_or_max_pos_seq_len"] = buckets
        sections[stack] = values
    gated = "gated" in model.config.feed_forward_proj
    sections["structure"] = {
        "t5_with_bias": "false",
        "use_gated_activation": "1" if gated else "false",
        "position_embedding_type": "relative",
    }
    w.ini(sections)
    for name, value in state.items():
        _t5_tensor(w, name, value, gated)
    for i in range(sections["decoder"]["num_layers"]):
        at = f"decoder.block.{i}.layer.0.SelfAttention"
        parts = [state[f"{at}.{part}.weight"].T for part in "qkv"]
        w.split(f"{at}.qkv.weight", np.stack(parts, axis=1), 2)


def _t5_tensor(w: Writer, name: str, value: Array, gated: bool) -> None:
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if name == "shared.weight":
        w.one("shared.weight", value.T)
        w.one("shared.weight_T", value)
    elif name == "lm_head.weight" or module.endswith("layer_norm"):
        w.one(name, value)
    elif module in ("o", "wo", "relative_attention_bias"):
        w.split(name, value.T, 0)
    elif module in ("wi_0", "wi_1"):
        w.split(name.replace("wi_0", "wi").replace("wi_1", "wi2"), value.T, 1)
    elif module == "wi" or "EncDec" in name or ("encoder" in name and module in "qkv"):
        w.split(name, value.T, 1)


def _sizes(w: Writer, heads: int, hidden: int, ffn: int, layers: int, vocab: int) -> dict[str, Any]:
    return {
        "head_num": heads,
        "size_per_head": hidden // heads,
        "inter_size": ffn,
        "num_layer": layers,
        "vocab_size": vocab,
        "start_id": 1,
        "end_id": 2,
        "weight_data_type": w.dtype,
    }


def _norm(w: Writer, stem: str, state: dict[str, Array], name: str) -> None:
    for part in ("weight", "bias"):
        w.one(f"{stem}.{part}", state[f"{name}.{part}"])


def _layer(
    w: Writer,
    i: int,
    qkv: tuple[Array, Array | None],
    others: dict[str, tuple[Array, Array | None]],
    divide: float = 1,
) -> None:
    """Weights are [in, out] here, qkv [in, 3, out]."""
    at = f"model.layers.{i}."
    w.split(f"{at}attention.query_key_value.weight", qkv[0], 2)
    if qkv[1] is not None:
        w.split(f"{at}attention.query_key_value.bias", qkv[1], 1)
    for module, (weight, bias) in others.items():
        first = module == "mlp.dense_h_to_4h"
        w.split(f"{at}{module}.weight", weight, 1 if first else 0)
        if bias is None:
            continue
        if first:
            w.split(f"{at}{module}.bias", bias, 0)
        else:
            w.one(f"{at}{module}.bias", bias / divide)


def _gpt2(w: Writer, model: Any, state: dict[str, Array]) -> None:
    c = model.config
    sizes = _sizes(w, c.n_head, c.n_embd, 4 * c.n_embd, c.n_layer, c.vocab_size)
    own = {"model_name": "gpt", "max_pos_seq_len": c.n_positions, "tensor_para_size": w.gpus}
    w.ini({"gpt": own | sizes})
    w.one("model.wte", state["transformer.wte.weight"])
    w.one("model.wpe", state["transformer.wpe.weight"])
    _norm(w, "model.final_layernorm", state, "transformer.ln_f")
    for i in range(c.n_layer):
        at = f"transformer.h.{i}."
        _norm(w, f"model.layers.{i}.input_layernorm", state, f"{at}ln_1")
        _norm(w, f"model.layers.{i}.post_attention_layernorm", state, f"{at}ln_2")
        weight, bias = state[f"{at}attn.c_attn.weight"], state[f"{at}attn.c_attn.bias"]
        others = {
            "attention.dense": "attn.c_proj",
            "mlp.dense_h_to_4h": "mlp.c_fc",
            "mlp.dense_4h_to_h": "mlp.c_proj",
        }
        _layer(
            w,
            i,
            (weight.reshape(c.n_embd, 3, c.n_embd), bias.reshape(3, c.n_embd)),
            {k: (state[f"{at}{v}.weight"], state[f"{at}{v}.bias"]) for k, v in others.items()},
        )


def _opt(w: Writer, model: Any, state: dict[str, Array]) -> None:
    c = model.config
    before = c.do_layer_norm_before
    sizes = _sizes(
        w, c.num_attention_heads, c.hidden_size, c.ffn_dim, c.num_hidden_layers, c.vocab_size
    )
    own = {
        "model_name": "opt",
        "max_pos_seq_len": c.max_position_embeddings,
        "layernorm_eps": "1e-5",
        "layernorm_type": "pre_layernorm" if before else "post_layernorm",
        "activation_type": "Relu",
        "has_post_decoder_layernorm": "1" if before else "0",
        "int8": "False",
    }
    w.ini({"gpt": own | sizes})
    top = "model.decoder."
    embed = state[f"{top}embed_tokens.weight"]
    if f"{top}project_in.weight" in state:
        w.one("model.wte", embed @ state[f"{top}project_in.weight"].T)
        w.one("model.lm_head.weight", embed @ state[f"{top}project_out.weight"])
    else:
        w.one("model.wte", embed)
        w.one("model.lm_head.weight", embed)
    w.one("model.wpe", state[f"{top}embed_positions.weight"][2:])
    if before:
        _norm(w, "model.final_layernorm", state, f"{top}final_layer_norm")
    for i in range(c.num_hidden_layers):
        at = f"{top}layers.{i}."
        _norm(w, f"model.layers.{i}.input_layernorm", state, f"{at}self_attn_layer_norm")
        _norm(w, f"model.layers.{i}.post_attention_layernorm", state, f"{at}final_layer_norm")
        _layer(w, i, _stacked(state, f"{at}self_attn."), _named(state, at, _OPT))


def _gptj(w: Writer, model: Any, state: dict[str, Array]) -> None:
    c = model.config
    sizes = _sizes(w, c.n_head, c.n_embd, 4 * c.n_embd, c.n_layer, c.vocab_size)
    w.ini({"gptj": {"model_name": "gptj", "rotary_embedding": c.rotary_dim} | sizes})
    w.one("model.wte", state["transformer.wte.weight"])
    w.one("model.lm_head.weight", state["lm_head.weight"])
    w.one("model.lm_head.bias", state["lm_head.bias"])
    _norm(w, "model.final_layernorm", state, "transformer.ln_f")
    for i in range(c.n_layer):
        at = f"transformer.h.{i}."
        _norm(w, f"model.layers.{i}.input_layernorm", state, f"{at}ln_1")
        _layer(w, i, _stacked(state, f"{at}attn."), _named(state, at, _GPTJ))


def _bloom(w: Writer, model: Any, state: dict[str, Array]) -> None:
    c = model.config
    sizes = _sizes(w, c.n_head, c.hidden_size, 4 * c.hidden_size, c.n_layer, c.vocab_size)
    own = {
        "tensor_para_size": w.gpus,
        "model_variant": "bloom-pre",
        "layernorm_eps": c.layer_norm_epsilon,
        "layernorm_type": "pre_layernorm",
        "activation_type": "Gelu",
        "has_positional_encoding": False,
        "has_pre_decoder_layernorm": True,
        "has_post_decoder_layernorm": True,
        "use_attention_linear_bias": True,
    }
    w.ini({"gpt": own | sizes})
    w.one("model.wte", state["transformer.word_embeddings.weight"])
    _norm(w, "model.pre_decoder_layernorm", state, "transformer.word_embeddings_layernorm")
    _norm(w, "model.final_layernorm", state, "transformer.ln_f")
    for i in range(c.n_layer):
        _by_heads_layer(w, i, state, f"transformer.h.{i}.", "self_attention", c.n_head)


def _gptneox(w: Writer, model: Any, state: dict[str, Array]) -> None:
    c = model.config
    heads, layers = c.num_attention_heads, c.num_hidden_layers
    sizes = _sizes(w, heads, c.hidden_size, c.intermediate_size, layers, c.vocab_size)
    rotary = int(c.hidden_size // heads * c.rope_parameters["partial_rotary_factor"])
    own = {"rotary_embedding": rotary, "use_gptj_residual": int(c.use_parallel_residual)}
    w.ini({"gptneox": own | sizes})
    w.one("model.wte", state["gpt_neox.embed_in.weight"])
    head = "lm_head.weight" if "lm_head.weight" in state else "embed_out.weight"
    w.one("model.lm_head.weight", state[head])
    _norm(w, "model.final_layernorm", state, "gpt_neox.final_layer_norm")
    for i in range(layers):
        at = f"gpt_neox.layers.{i}."
        _by_heads_layer(w, i, state, at, "attention", heads, divide=w.gpus)
        total = state[f"{at}attention.dense.bias"] + state[f"{at}mlp.dense_4h_to_h.bias"]
        if c.use_parallel_residual:
            w.one(f"model.layers.{i}.mlp.attention.bias.sum", total / w.gpus)


def _by_heads_layer(
    w: Writer,
    i: int,
    state: dict[str, Array],
    at: str,
    attention: str,
    heads: int,
    divide: float = 1,
) -> None:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        _norm(w, f"model.layers.{i}.{norm}", state, f"{at}{norm}")
    weight = state[f"{at}{attention}.query_key_value.weight"].T
    bias = state[f"{at}{attention}.query_key_value.bias"]
    hidden = weight.shape[0]
    weight = weight.reshape(hidden, heads, 3, -1).transpose(0, 2, 1, 3).reshape(hidden, 3, hidden)
    bias = bias.reshape(heads, 3, -1).transpose(1, 0, 2).reshape(3, hidden)
    names = {"attention.dense": f"{attention}.dense"}
    names |= {name: name for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")}
    _layer(w, i, (weight, bias), _named(state, at, names), divide)


_OPT = {
    "attention.dense": "self_attn.out_proj",
    "mlp.dense_h_to_4h": "fc1",
    "mlp.dense_4h_to_h": "fc2",
}
_GPTJ = {
    "attention.dense": "attn.out_proj",
    "mlp.dense_h_to_4h": "mlp.fc_in",
    "mlp.dense_4h_to_h": "mlp.fc_out",
}


def _stacked(state: dict[str, Array], at: str) -> tuple[Array, Array | None]:
    weights = [state[f"{at}{part}_proj.weight"].T for part in "qkv"]
    biases = [state.get(f"{at}{part}_proj.bias") for part in "qkv"]
    return np.stack(weights, 1), None if biases[0] is None else np.stack(biases)  # type: ignore[arg-type]


def _named(
    state: dict[str, Array], at: str, names: dict[str, str]
) -> dict[str, tuple[Array, Array | None]]:
    return {
        stored: (state[f"{at}{name}.weight"].T, state.get(f"{at}{name}.bias"))
        for stored, name in names.items()
    }


_FAMILIES = {
    "t5": _t5,
    "mt5": _t5,
    "gpt2": _gpt2,
    "opt": _opt,
    "gptj": _gptj,
    "bloom": _bloom,
    "gpt_neox": _gptneox,
}
