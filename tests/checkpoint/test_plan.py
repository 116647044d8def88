"""Matching a checkpoint with its family: what is accepted, and what each mismatch says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.plan import make_plan
from lmi_multi.checkpoint.reader import CheckpointReader
from lmi_multi.errors import CheckpointError, UnsupportedModelError

from .tiny import LLAMA, State, llama_state, t5_config, t5_state, write


def plan_of(folder: Path) -> Any:
    return make_plan(folder, CheckpointReader(folder))


def converted(tmp_path: Path, state: State, config: dict[str, Any] = LLAMA) -> Artifact:
    return convert(write(tmp_path / "c", state, config), tmp_path / "out")


def drop(part: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return edit


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[State], None]:
    return lambda state: state.update({name: torch.ones(shape).to(dtype)})


LAYER = "model.layers.1."
FAULTS: dict[str, tuple[Callable[[State], None], str]] = {
    "missing": (drop("model.norm.weight"), r"the checkpoint lacks norm\.weight"),
    "many missing": (
        drop("layers.1"),
        r"lacks layers\.1\.input_layernorm\.weight.* and 4 more",
    ),
    "left over": (put("model.visual.weight", 3), r"does not use: model\.visual\.weight"),
    "extra layer": (put("model.layers.2.mlp.up_proj.weight", 24, 16), "does not use: model.layers"),
    "bias of a table": (put("model.embed_tokens.bias", 16), r"not use: model\.embed_tokens\.bias"),
    "misshapen": (
        put(LAYER + "mlp.down_proj.weight", 16, 25),
        r"down_proj.weight with shape \[16, 25\].*decoder\.1\.down\.weight.*expected \[16, 24\]",
    ),
    "cannot be joined": (
        put(LAYER + "self_attn.k_proj.weight", 8, 17),
        r"q_proj.* cannot become decoder\.1\.qkv\.weight",
    ),
    "vocabulary": (put("model.embed_tokens.weight", 38, 16), r"\[38, 16\], expected \[37, 16\]"),
    "one dimension": (put(LAYER + "mlp.down_proj.weight", 16), "with shape"),
    "no dimension": (put(LAYER + "self_attn.k_proj.weight"), "cannot become"),
    "integers": (
        put("model.norm.weight", 16, dtype=torch.int32),
        "'model.norm.weight' has dtype int32, expected one of float32, float16",
    ),
    "bias in one layer": (
        put(LAYER + "self_attn.o_proj.bias", 16),
        r"out\.bias is in decoder layers 1 but not in 0",
    ),
    "bias of one source": (put(LAYER + "mlp.up_proj.bias", 24), r"lacks layers\.1\.mlp\.gate_proj"),
    "norm in one layer": (
        put(LAYER + "self_attn.q_norm.weight", 4),
        r"q_norm\.weight is in decoder layers 1 but not in 0",
    ),
    "two names": (put("norm.weight", 16), "both mean 'norm.weight'"),
    "bias of no head": (
        lambda state: state.update({"lm_head.bias": state.pop("lm_head.weight")[:, 0].clone()}),
        r"the checkpoint lacks lm_head\.weight",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_refuses(tmp_path: Path, case: str) -> None:
    edit, message = FAULTS[case]
    state = llama_state()
    edit(state)
    with pytest.raises(CheckpointError, match=message) as caught:
        converted(tmp_path, state)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["NewForCausalLM"]}, "'NewForCausalLM' is not supported; known: "),
        ({"architectures": []}, "architectures is"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        ({"num_hidden_layers": 10**9}, "declares 1000000000 layers, but .* holds 21 tensors"),
        ({"num_hidden_layers": 3}, r"lacks layers\.2\."),
        ({"num_attention_heads": 3}, "must be a multiple of kv_heads"),
        ({"hidden_size": "x"}, "hidden_size is 'x', must be int"),
    ],
)
def test_refuses_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, llama_state(), LLAMA | changes)


def test_quantization_config_is_unsupported(tmp_path: Path) -> None:
    folder = write(tmp_path, llama_state(), LLAMA | {"quantization_config": {"bits": 4}})
    with pytest.raises(UnsupportedModelError):
        plan_of(folder)


def test_ignored_tensors_may_be_integers(tmp_path: Path) -> None:
    state = llama_state()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(2)
    plan = plan_of(write(tmp_path, state))
    assert plan.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_base_prefix_may_be_absent(tmp_path: Path) -> None:
    state = {name.removeprefix("model."): tensor for name, tensor in llama_state().items()}
    assert "decoder.1.down.weight" in plan_of(write(tmp_path, state)).tensors


def test_biases_come_with_the_tensors(tmp_path: Path) -> None:
    state = llama_state()
    for i in range(2):
        for part, size in (("q", 16), ("k", 8), ("v", 8)):
            state[f"model.layers.{i}.self_attn.{part}_proj.bias"] = torch.full((size,), float(size))
    tensors = converted(tmp_path, state).load_rank(1, 2)
    assert tensors["decoder.0.qkv.bias"].tolist() == [16.0] * 8 + [8.0] * 8


def test_head_equal_to_the_embedding_is_dropped(tmp_path: Path) -> None:
    state = llama_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    assert "head.weight" not in plan_of(write(tmp_path, state)).tensors
    state["lm_head.weight"][-1, -1] += 1
    assert "head.weight" in plan_of(write(tmp_path, state)).tensors
    del state["lm_head.weight"]
    assert "head.weight" not in plan_of(write(tmp_path, state)).tensors


def test_missing_head_of_an_untied_model(tmp_path: Path) -> None:
    state = llama_state()
    del state["lm_head.weight"]
    folder = write(tmp_path, state, LLAMA | {"tie_word_embeddings": False})
    with pytest.raises(
        CheckpointError, match=r"lacks lm_head\.weight.*tie_word_embeddings is false"
    ):
        plan_of(folder)


def test_head_of_other_dtype_is_kept(tmp_path: Path) -> None:
    state = llama_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].half()
    assert "head.weight" in plan_of(write(tmp_path, state)).tensors


@pytest.mark.parametrize(
    "alias", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
)
def test_shared_embedding_under_another_name(tmp_path: Path, alias: str) -> None:
    state = t5_state()
    shared = state[alias] = state.pop("shared.weight")
    tensors = converted(tmp_path, state, t5_config()).load_rank(0, 1)
    assert torch.equal(tensors["embed.weight"], shared)
    assert "head.weight" not in tensors


def test_copies_of_the_shared_embedding_are_ignored(tmp_path: Path) -> None:
    state = t5_state()
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        state[name] = state["shared.weight"].clone()
    folder = write(tmp_path, state, t5_config())
    plan = plan_of(folder)
    assert plan.ignored == ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
    assert "head.weight" not in plan.tensors


def test_own_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in llama_state().items()}
    state["model.norm.weight"] = state["model.norm.weight"].float()
    assert plan_of(write(tmp_path, state)).dtype == "bf16"
