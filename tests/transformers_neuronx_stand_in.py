"""A stand-in for transformers-neuronx, and tiny models that it runs.

It has the library's signatures, loads what was written for it with Hugging Face's own classes, and
treats its rows as the library does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lmi_multi.backends.neuron.transformers_neuronx_ports import PORTS
from torch import Tensor
from transformers import AutoModelForCausalLM

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from tests.families import FAMILIES, Tiny
from tests.neuron_libraries import Library

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
RUN: dict[str, Tiny] = {
    "gpt2": FAMILIES["gpt2"],
    "opt": FAMILIES["opt"],
    "bloom": FAMILIES["bloom"],
    "gptj": FAMILIES["gptj"],
    "gptneox": Tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES | {"hidden_act": "gelu_new"}),
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", _SIZES | {"num_key_value_heads": 2}),
    "mistral": Tiny(
        "MistralForCausalLM",
        "MistralConfig",
        _SIZES | {"num_key_value_heads": 2, "sliding_window": 7},
    ),
}
MANY = ("llama", "mistral")
NEFFS = {"0123.neff": b"tokens", "4567.neff": b"prompts"}


def artifact(family: str, folder: Path, tiny: Tiny | None = None, **options: Any) -> Artifact:
    target = folder / f"tnx-{family}"
    if not target.exists():
        (tiny or RUN[family]).save(folder / f"tnx-{family}-hf")
        convert(folder / f"tnx-{family}-hf", target, **{"dtype": "fp32", **options})
    return Artifact.open(target)


class Network:
    """What the library keeps: the tokens of each row, here recomputed as a whole every time."""

    def __init__(self, folder: str, rows: int) -> None:
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.rows: list[dict[int, int]] = [{} for _ in range(rows)]

    def last(self, row: int, place: int) -> Tensor:
        known = torch.tensor([[self.rows[row][i] for i in range(place + 1)]])
        logits: Tensor = self.network(known).logits
        return logits[0, -1].float()

    def many(self, ids: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """As a batch of rows that come and go: prompts go to the rows that are named; with single
        tokens, rows that are not named get token 0 at place 0."""
        assert ids.dtype == places.dtype == torch.int64
        if ids.shape[1] == 1:
            for row in set(range(len(self.rows))) - set(rows.tolist()):
                self.rows[row][0] = 0
        for own, at, row in zip(ids.tolist(), places.tolist(), rows.tolist(), strict=True):
            self.rows[row].update(zip(at, own, strict=True))
        return torch.stack(
            [self.last(r, p) for r, p in zip(rows.tolist(), places[:, -1].tolist(), strict=True)]
        )

    def one(self, ids: Tensor, places: Tensor) -> Tensor:
        """As a batch of one row."""
        assert places.dtype == torch.int32
        self.rows[0].update(zip(places.tolist(), ids[0].tolist(), strict=True))
        return self.last(0, int(places[-1]))[None]


def stand_in() -> Library:
    def from_pretrained(cls: Any, folder: str, **options: Any) -> Any:
        model = cls(SimpleNamespace(), **options)
        model.held = Network(folder, options["batch_size"])
        model.compiled, model.folder = False, None
        return model

    def compile_it(self: Any) -> None:
        self.compiled = True

    def to_neuron(self: Any) -> None:
        if self.folder is None:
            compile_it(self)
        elif {path.name for path in self.folder.iterdir()} != set(NEFFS):
            raise FileNotFoundError("Could not find a matching NEFF for your HLO")

    def save(self: Any, folder: str) -> None:
        assert self.compiled
        for name, content in NEFFS.items():
            (Path(folder) / name).write_bytes(content)

    behaviours: dict[str, Callable[..., Any]] = {
        "module.PretrainedModel.from_pretrained": from_pretrained,
        "base.NeuronModelBase.cpu_compile": compile_it,
        "base.NeuronModelBase.to_neuron": to_neuron,
        "base.NeuronModelBase.save": save,
        "base.NeuronModelBase.load": lambda self, folder: setattr(self, "folder", Path(folder)),
    }
    for port in PORTS.values():
        for module in ("gpt2", "opt", "bloom", "gptj", "gptneox", "llama", "mistral"):
            behaviours[f"{module}.model.{port.name}.forward"] = (
                (lambda self, *given: self.held.many(*given))
                if port.continuous
                else (lambda self, *given: self.held.one(*given))
            )
    behaviours["config.ContinuousBatchingConfig.__init__"] = lambda self, **given: setattr(
        self, "given", given
    )
    behaviours["config.NeuronConfig.__init__"] = lambda self, **given: setattr(self, "given", given)
    return Library("transformers_neuronx", behaviours)
