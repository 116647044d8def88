"""What is compared: lmi_multi, and what its users would run instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import lmi_multi
from benchmarks.shapes import DTYPES

OURS = "lmi_multi"


class Contender(Protocol):
    """A loaded model that answers prompts greedily."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Exactly `new_tokens` generated tokens a prompt, on the host when it returns."""

    def close(self) -> None:
        """Free the model."""


class Ours:
    """lmi_multi, loaded from an artifact as `load` does."""

    def __init__(self, folder: Path, dtype: str, device: str, max_batch: int) -> None:
        self.model = lmi_multi.load(
            folder, backend=device, dtype=dtype, max_batch=max_batch, prefix_caching=False
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """See `Contender.generate`."""
        return [c.token_ids for c in self.model.generate(prompts, max_new_tokens=new_tokens)]

    def close(self) -> None:
        """See `Contender.close`."""
        self.model.close()


class Transformers:
    """`generate` of Hugging Face transformers as it comes: SDPA attention, dynamic cache."""

    def __init__(self, folder: Path, dtype: str, device: str, max_batch: int) -> None:
        loaded: Any = transformers.AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, loaded.architectures[0])
        model = model_class.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="sdpa")
        self.model: Any = model.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """See `Contender.generate`."""
        ids = torch.tensor(prompts, device=self.device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
        )
        answers: list[list[int]] = output[:, -new_tokens:].tolist()
        return answers

    def close(self) -> None:
        """See `Contender.close`."""
        del self.model


# Every one is built from (folder, dtype, device, max_batch). Ours opens an artifact, the others
# the checkpoint that it was converted from.
PEERS: dict[str, Callable[[Path, str, str, int], Contender]] = {"transformers": Transformers}
