"""Four layers with heads as large as real models': logits and captured steps against Hugging Face.

The matrix's tiny shapes leave most of the kernels' tiles empty; these fill them. On the CPU a few
run, so that the test itself is tried everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmi_multi.backends.base import Executor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.engine.batch import Prompt
from lmi_multi.engine.engine import Engine
from lmi_multi.engine.sequence import Sequence
from lmi_multi.options import GenerateOptions
from tests.families import FAMILIES, VOCAB, Tiny
from tests.matrix import LIMITS, Cell, executor, unavailable
from tests.test_matrix import LARGEST_ERROR, looks_ahead, step_logits

LENGTHS = (37, 5, 24)
STEPS = 12
EOS = 2
LAYERS = {"num_hidden_layers": 4, "max_position_embeddings": 128}


def _sized(name: str, hidden: int, **settings: Any) -> Tiny:
    """The family's class with other sizes. Weights as large as keeps activations near one."""
    tiny = FAMILIES[name]
    return replace(tiny, settings=settings, std=hidden**-0.5)


def _t5(name: str, **settings: Any) -> Tiny:
    sizes = {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048, "num_layers": 4}
    return _sized(name, 768, decoder_start_token_id=0, **(sizes | settings))


def _gpt(name: str, hidden: int, heads: int, **settings: Any) -> Tiny:
    sizes = {"n_embd": hidden, "n_layer": 4, "n_head": heads, "n_positions": 128}
    return _sized(name, hidden, **sizes, **settings)


def _heads(name: str, hidden: int, heads: int, ffn: int, **settings: Any) -> Tiny:
    sizes = LAYERS | {"hidden_size": hidden, "num_attention_heads": heads}
    return _sized(name, hidden, **sizes, intermediate_size=ffn, **settings)


def _opt(name: str, hidden: int, heads: int, **settings: Any) -> Tiny:
    sizes = LAYERS | {"hidden_size": hidden, "num_attention_heads": heads, "ffn_dim": 4 * hidden}
    return _sized(name, hidden, **(sizes | {"word_embed_proj_dim": hidden} | settings))


MIDSIZE: dict[str, Tiny] = {  # with the size of a head, and a model that has it
    "t5": _t5("t5"),  # 64
    "t5-gated-untied": _t5("t5-gated-untied", feed_forward_proj="gated-gelu"),  # 64, flan-t5
    "mt5": _t5("mt5", feed_forward_proj="gated-gelu"),
    "umt5": _t5("umt5"),
    "gpt2": _gpt("gpt2", 768, 12),  # 64
    "opt": _opt("opt", 640, 8),  # 80, OPT-2.7b
    "opt-350m": _opt("opt-350m", 1024, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
    "bloom": _sized("bloom", 1024, hidden_size=1024, n_layer=4, n_head=8),  # 128, bloom-7b1
    "gptj": _gpt("gptj", 1024, 4, rotary_dim=64),  # 256, gpt-j-6b
    "gptneox": _heads("gptneox", 768, 8, 3072),  # 96, gpt-neox-20b
    "llama": _heads("llama", 1024, 8, 2752),  # 128, Llama 2
    "llama-gqa": _heads("llama-gqa", 1024, 8, 2752, num_key_value_heads=2),
    "mistral-window": _heads(
        "mistral-window", 1024, 8, 3584, num_key_value_heads=2, sliding_window=16
    ),
    "qwen2": _heads("qwen2", 896, 14, 4864, num_key_value_heads=2),  # 64, Qwen2-0.5B
    "qwen3": _heads("qwen3", 1024, 8, 3072, num_key_value_heads=4, head_dim=128),
    "bert": _heads("bert", 768, 12, 3072),  # 64
}
GENERATORS = [name for name in MIDSIZE if name != "bert"]
ON_CPU = ("t5-gated-untied", "gptj", "bert")


def cells(families: list[str]) -> list[Any]:
    """Every family on a GPU, and a few on the CPU."""
    found = []
    for family in families:
        if family in ON_CPU:
            found.append(pytest.param(Cell("cpu", family, "fp32", 1), marks=pytest.mark.slow))
        found.append(pytest.param(Cell("cuda", family, "fp32", 1), marks=pytest.mark.cuda))
    return found


@pytest.fixture
def loaded(cell: Cell, tmp_path: Path) -> Iterator[tuple[PreTrainedModel, Executor]]:
    """Hugging Face's model on the CPU, and the cell's executor over its converted checkpoint."""
    if reason := unavailable(cell):
        pytest.skip(reason)
    # TensorFloat-32 would round what is compared to ten bits.
    assert torch.get_float32_matmul_precision() == "highest"
    model = MIDSIZE[cell.family].save(tmp_path / "model")
    if looks_ahead(model):
        pytest.skip(f"{cell.family}: this release of transformers lets its decoder look ahead")
    convert(tmp_path / "model", tmp_path / "artifact", dtype="fp32")
    with executor(cell, Artifact.open(tmp_path / "artifact")) as opened:
        yield model, opened


def prompts() -> list[list[int]]:
    """Ragged random prompts; 0 to 2 are special tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.no_grad()
def theirs(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """Hugging Face's logits [tokens, vocab] of decoder tokens after a prompt, or of a text."""
    if model.config.is_encoder_decoder:
        ids = torch.tensor([tokens])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0]
    return model(input_ids=torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("cell", cells(GENERATORS), ids=str)
def test_logits_and_captured_steps(cell: Cell, loaded: tuple[PreTrainedModel, Executor]) -> None:
    model, ours = loaded
    encoder = model.config.is_encoder_decoder
    given = prompts()
    forced = [[0, *own[:9]] for own in reversed(given)] if encoder else given
    # Prefill, then a step of one token a row through the cache.
    cut = [len(tokens) - 1 for tokens in forced]
    parts = [
        step_logits(ours, model, given, forced, [0] * len(forced), cut),
        step_logits(ours, model, given, forced, cut, [n + 1 for n in cut]),
    ]
    for row, tokens in enumerate(forced):
        mine = torch.cat([part[row] for part in parts])
        error = mine - theirs(model, given[row], tokens)
        assert error.abs().max().item() <= LARGEST_ERROR
    for sequence, prompt in zip(generate(ours, given, encoder), given, strict=True):
        drawn = sequence.generated
        logits = theirs(model, prompt, sequence.tokens[:-1])[-len(drawn) :]
        scores = logits.log_softmax(-1)
        picked = scores.gather(-1, torch.tensor(drawn)[:, None])[:, 0]
        known = torch.tensor([entry.logprob for entry in sequence.logprobs])
        assert (known - picked).abs().max().item() <= LARGEST_ERROR
        scores[:, EOS] = -torch.inf  # answers have a least length
        assert (scores.amax(-1) - picked).max().item() <= LARGEST_ERROR  # none is likelier


def generate(ours: Executor, given: list[list[int]], encoder: bool) -> list[Sequence]:
    """Greedy answers with the log-probability of each token."""
    defaults = GenerationDefaults(eos_token_ids=(EOS,), decoder_start_token_id=0)
    options = GenerateOptions(max_new_tokens=STEPS, min_new_tokens=STEPS, logprobs=0)
    sequences = [
        Sequence(
            options=defaults.resolve(
                options,
                prompt_tokens=len(prompt),
                decoder_only=not encoder,
                limit=LIMITS.max_tokens,
            ),
            tokens=[0] if encoder else list(prompt),
            encoder_ids=list(prompt) if encoder else None,
        )
        for prompt in given
    ]
    Engine(ours).run(sequences)
    return sequences


@pytest.mark.parametrize("cell", cells(["bert", "t5-gated-untied"]), ids=str)
def test_encoder_output(cell: Cell, loaded: tuple[PreTrainedModel, Executor]) -> None:
    model, ours = loaded
    given = prompts()
    hidden, _ = ours.encode([Prompt(prompt, None) for prompt in given])
    for mine, prompt in zip(hidden.split_with_sizes(LENGTHS), given, strict=True):
        encoder = model if cell.family == "bert" else model.encoder
        with torch.no_grad():
            out = encoder(torch.tensor([prompt])).last_hidden_state[0]
        assert (mine - out).abs().max().item() <= LARGEST_ERROR
