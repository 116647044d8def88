"""Tiny models that eight cores can share, opened on the CPU and on emulated cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmi_multi.backends.base import Executor, Limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.engine.batch import Batch, Prompt, Row
from lmi_multi.ops.cpu import CpuOps
from lmi_multi.parallel.collectives import SingleRank
from tests.families import Tiny

LIMITS = Limits(max_batch=4, max_tokens=64, max_step_tokens=32, blocks=32, block_size=8)
LARGEST_ERROR = 2e-4
BF16_ERROR = 4e-2  # of the norm: a few times the unit roundoff 2^-8 for a handful of layers
DEGREES = (1, 2, 4, 8)
VOCAB = 101  # splits evenly over no degree but 1

# 8 heads, so that 8 cores can share them.
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 128}
_T5 = {"d_model": 40, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 8}
_HIDDEN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
_OPT = {"ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 64}
_FFN = {"intermediate_size": 96, "max_position_embeddings": 128}
WIDE: dict[str, Tiny] = {
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", _GPT),
    "opt": Tiny("OPTForCausalLM", "OPTConfig", _HIDDEN | _OPT),
    "bloom": Tiny(
        "BloomForCausalLM", "BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 8}
    ),
    "gptj": Tiny("GPTJForCausalLM", "GPTJConfig", _GPT | {"rotary_dim": 4}),
    "gptneox": Tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", _HIDDEN | _FFN),
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", _HIDDEN | _FFN | {"num_key_value_heads": 2}),
    "t5": Tiny("T5ForConditionalGeneration", "T5Config", _T5 | {"decoder_start_token_id": 0}),
    "bert": Tiny("BertModel", "BertConfig", _HIDDEN | _FFN),
}


def artifact(family: str, folder: Path, **options: Any) -> Artifact:
    """The family's checkpoint, converted once a session."""
    target = folder / "-".join([f"wide-{family}", *options.values()])
    if not target.exists():
        WIDE[family].save(folder / f"wide-{family}-hf")
        convert(folder / f"wide-{family}-hf", target, **{"dtype": "fp32", **options})
    return Artifact.open(target)


def on_cpu(opened: Artifact) -> Executor:
    return TorchExecutor(opened.spec, opened.load_rank(0, 1), LIMITS, CpuOps(), SingleRank())


def emulated(opened: Artifact, degree: int) -> Any:
    from lmi_multi.backends.neuron.emulator import EmulatorRuntime
    from lmi_multi.backends.neuron.loading import open_executor

    return open_executor(opened, degree, LIMITS, EmulatorRuntime())


def ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def batches(kind: str) -> list[Batch]:
    """A prefill of ragged rows, and steps after it, the last one in the next context bucket."""
    cross = kind == "encoder-decoder"
    starts = (29, 5, 12)
    result = []
    for step in range(4):
        rows = [
            Row(
                token_ids=ids(n, i) if step == 0 else ids(1, 10 * step + i),
                start=0 if step == 0 else n + step - 1,
                blocks=range(5 * i, 5 * i + 5),
                prompt_length=n,
                cross_blocks=range(16 + 4 * i, 20 + 4 * i) if cross else (),
                cross_length=7 + 10 * i if cross else 0,
            )
            for i, n in enumerate(starts)
        ]
        prompts = [Prompt(ids(r.cross_length, 7), None, r.cross_blocks) for r in rows if cross]
        result.append(Batch(rows, prompts if step == 0 else ()))
    return result
