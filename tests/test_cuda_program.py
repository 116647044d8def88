"""Steps whose layers are one persistent kernel, against the same steps kernel by kernel.

Those kernels are compared with float64 in test_cuda_kernels.py and test_cuda_heads.py. The
arithmetic is the same but for the order of sums, so what differs beyond that is a race or a wrong
address.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.random_model import random_model
from benchmarks.shapes import Shape
from lmi_multi import backends
from lmi_multi.backends.base import Limits
from lmi_multi.parallel.collectives import SingleRank

pytestmark = pytest.mark.cuda

TOLERANCE = {"fp32": 2e-5, "fp16": 4e-3, "bf16": 3e-2}
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16)
LIMITS = Limits(max_batch=16, max_tokens=640, max_step_tokens=640, blocks=1300, block_size=16)

SHAPES = {
    "flan": Shape(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 1024, "d_ff": 2816, "num_layers": 2, "num_heads": 16, "d_kv": 64}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": 999},
    ),
    "gptj": Shape(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"n_embd": 2048, "n_layer": 2, "n_head": 8, "rotary_dim": 64, "vocab_size": 999},
    ),
    "gpt2": Shape(
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 768, "n_layer": 3, "vocab_size": 999}
    ),
    "bloom": Shape(
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 640, "n_layer": 3, "n_head": 8, "vocab_size": 999},
    ),
    "neox": Shape(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {"hidden_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8}
        | {"intermediate_size": 3072, "vocab_size": 999},
    ),
    "opt-350m": Shape(
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16, "ffn_dim": 4096}
        | {"do_layer_norm_before": False, "word_embed_proj_dim": 512, "vocab_size": 999},
    ),
    # A row has as many features as registers hold of it, and more.
    "held": Shape(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "intermediate_size": 1024, "vocab_size": 999},
    ),
    "too-wide": Shape(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"hidden_size": 4224, "num_hidden_layers": 1, "num_attention_heads": 33}
        | {"num_key_value_heads": 11, "intermediate_size": 1024, "vocab_size": 999},
    ),
    "too-wide-opt": Shape(
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 4224, "num_hidden_layers": 1, "num_attention_heads": 33, "ffn_dim": 1024}
        | {"word_embed_proj_dim": 4224, "vocab_size": 999},
    ),
    "held-gptj": Shape(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"n_embd": 4096, "n_layer": 1, "n_head": 16, "rotary_dim": 64, "n_inner": 1024}
        | {"vocab_size": 999},
    ),
    # Its last product's features are shared by more blocks than are added up at a time.
    "many-splits": Shape(
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "ffn_dim": 20480}
        | {"word_embed_proj_dim": 512, "vocab_size": 999},
    ),
    "llama-gqa": Shape(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8}
        | {"num_key_value_heads": 2, "intermediate_size": 2752, "vocab_size": 999},
    ),
    # Few heads, and so wide that all of a block's warps share each of them; products of which
    # blocks have several tiles, and one whose features are shared where registers hold x.
    "wide-gptj": Shape(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"n_embd": 512, "n_layer": 1, "n_head": 2, "rotary_dim": 64, "n_inner": 4352}
        | {"vocab_size": 999},
    ),
    "wide-flan": Shape(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 512, "d_ff": 2304, "num_layers": 1, "num_heads": 2, "d_kv": 256}
        | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": 999},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        pytest.skip(f"cuda: {state.reason}")
    need_programs()


def need_programs() -> None:
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuda: there are no step programs for this GPU")


def opened(
    shape: str, dtype: Any, quantize: Any, program_rows: int, limits: Limits = LIMITS
) -> Any:
    from lmi_multi.backends.cuda.executor import CudaExecutor
    from lmi_multi.backends.cuda.ops import Scratch

    device = torch.device("cuda", 0)
    spec, tensors = random_model(SHAPES[shape], dtype, quantize, device)
    for name, tensor in tensors.items():
        # So that what an FFN finds counts, as it does anyway with codes.
        if name.endswith("norm2.weight") and quantize is None:
            tensor.uniform_(0.5, 1.5)
        # So that rows have a mean, and LayerNorms something to add.
        if name == "embed.weight":
            tensor.add_(tensor.std() + 0.1)
        if name == "embed_norm.bias":
            tensor.add_(1)
        if name.endswith(("norm1.bias", "norm2.bias")):
            tensor.uniform_(-0.5, 0.5)
    scratch = Scratch(device, limits.max_batch * spec.heads)
    executor = CudaExecutor(spec, tensors, limits, scratch, SingleRank(), program_rows=program_rows)
    torch.manual_seed(1)
    for kept in (*executor._cache.k, *executor._cache.v):
        kept.normal_()
    return executor


def arrange(executor: Any, rows: int) -> None:
    """Rows of random lengths, some of them long enough for several splits."""
    chance = random.Random(rows)
    inputs = executor._fed.inputs
    # Prompts have blocks of their own: their keys are read before what is written in a step.
    blocks = chance.sample(range(LIMITS.blocks), 2 * inputs.table.numel())
    table, cross_table = torch.tensor(blocks, dtype=torch.int32).view(2, *inputs.table.shape)
    lengths = [chance.choice((1, 2, 16, 17, 129, 300, 639)) for _ in inputs.lengths]
    inputs.table.copy_(table)
    inputs.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
    inputs.ids.copy_(torch.tensor([chance.randrange(999) for _ in inputs.ids]))
    if inputs.cross_table.numel():
        inputs.cross_table.copy_(cross_table)
        inputs.cross_lengths.copy_(torch.tensor(lengths, dtype=torch.int32).flip(0))


@torch.inference_mode()
def logits(executor: Any, rows: int, times: int) -> list[Tensor]:
    """What a captured step computes, again and again; each time a token further."""
    step = executor._fed.logits(rows)
    arrange(executor, rows)  # capturing has cleared it
    found = []
    for _ in range(times):
        found.append(step.replay()[:rows].clone())
        executor._fed.inputs.lengths.add_(1).clamp_(max=LIMITS.max_tokens)
    return found


CASES = [
    *((shape, dtype, None) for shape in SHAPES for dtype in ("fp32", "bf16")),
    *(
        ("flan", "bf16", "fp8"),
        ("gptj", "fp16", "fp8"),
        ("flan", "bf16", "int8"),
        ("gptj", "fp16", "int8"),
        ("gpt2", "fp32", "int8"),
        ("neox", "bf16", "int8"),
        ("llama-gqa", "bf16", "int8"),
        ("opt-350m", "bf16", "fp8"),
        ("held", "bf16", "int8"),
        ("bloom", "bf16", "fp8"),
        ("held-gptj", "bf16", "int8"),
        ("many-splits", "bf16", "int8"),
        ("too-wide", "bf16", "int8"),
    ),
    *(("gptj", "fp16", None), ("bloom", "fp16", None), ("llama-gqa", "fp16", None)),
]


@pytest.mark.parametrize(("shape", "dtype", "quantize"), CASES)
def test_logits_are_those_of_single_kernels(shape: str, dtype: str, quantize: str | None) -> None:
    ours = opened(shape, dtype, quantize, 8 if dtype == "fp32" else 16)
    theirs = opened(shape, dtype, quantize, 0)
    for rows in ROWS:
        found, expected = logits(ours, rows, 4), logits(theirs, rows, 4)
        for n, (a, b) in enumerate(zip(found, expected, strict=True)):
            error = ((a - b).norm() / b.norm()).item()
            assert error < TOLERANCE[dtype], f"{rows} rows, step {n}: {error}"
    assert ours._fed._programs
    assert all(ours._fed._programs.values())  # none was refused
    assert not any(ours._fed._scratch.counters.tolist())


@pytest.mark.parametrize("most", [9, 11, 13])
@pytest.mark.parametrize(
    ("shape", "quantize"), [("flan", None), ("gptj", None), ("bloom", "int8"), ("held", None)]
)
def test_a_largest_batch_between_powers_of_two(shape: str, quantize: str | None, most: int) -> None:
    """Its program has as many rows, and not sixteen."""
    limits = replace(LIMITS, max_batch=most)
    ours, theirs = (opened(shape, "bf16", quantize, rows, limits) for rows in (16, 0))
    for rows in (most - 1, most):
        found, expected = logits(ours, rows, 2), logits(theirs, rows, 2)
        for a, b in zip(found, expected, strict=True):
            assert ((a - b).norm() / b.norm()).item() < TOLERANCE["bf16"]
    assert ours._fed._programs[most]
