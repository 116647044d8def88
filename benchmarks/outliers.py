"""A random T5 with outliers: a few FFN channels whose activations reach 1e5.

Channels are made so without changing what the network computes: rows of the up projection are
multiplied by what the same columns of the down projection are divided by. Rounded types see the
difference: such activations leave fp16's range, and rows of one weight differ by ten thousand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

LARGEST = 1e5
_CHANNELS = 4  # of each FFN
_SETTINGS: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 4,
    "num_heads": 8,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def save(folder: Path) -> float:
    """Write the checkpoint, in float32; returns the largest FFN activation over `prompts`."""
    config = transformers.T5Config(**_SETTINGS)
    torch.manual_seed(0)
    model: Any = transformers.T5ForConditionalGeneration(config)
    model.eval()
    # transformers ties the head whatever the config says. Scores that tell tokens apart.
    head = torch.randn(config.vocab_size, config.d_model) * 1.5 / config.d_model**0.5
    model.lm_head.weight = torch.nn.Parameter(head)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_norm.weight"):  # some features are larger than others
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
            parameter.data[:: config.d_model // 5] *= 8
    _grow(model)
    model.save_pretrained(folder)
    return max(_peaks(model).values())


def prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids, the same in every run; 0 and 1 are special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 512, (count, length), generator=generator).tolist()


def _ffns(model: Any) -> list[Any]:
    return [
        block.layer[-1].DenseReluDense
        for stack in (model.encoder, model.decoder)
        for block in stack.block
    ]


def _grow(model: Any) -> None:
    """Channels of each FFN grow until their largest activation is `LARGEST`."""
    for number, ffn in enumerate(_ffns(model)):
        channels = range(number, ffn.wo.weight.shape[1], ffn.wo.weight.shape[1] // _CHANNELS)
        chosen = torch.tensor(list(channels)[:_CHANNELS])
        factor = LARGEST / _peaks(model, chosen)[ffn]
        with torch.no_grad():
            ffn.wi_1.weight[chosen] *= factor
            ffn.wo.weight[:, chosen] /= factor


@torch.no_grad()
def _peaks(model: Any, channels: Tensor | None = None) -> dict[Any, float]:
    """The largest activation in each FFN over some prompts, of these channels or of all."""
    found: dict[Any, float] = {}

    def note(wo: Any, inputs: tuple[Tensor]) -> None:
        seen = inputs[0] if channels is None else inputs[0][..., channels]
        found[owner[wo]] = max(found.get(owner[wo], 0.0), seen.abs().max().item())

    owner = {ffn.wo: ffn for ffn in _ffns(model)}
    hooks = [wo.register_forward_pre_hook(note) for wo in owner]
    ids = torch.tensor(prompts(8, 48))
    model(input_ids=ids, decoder_input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found
