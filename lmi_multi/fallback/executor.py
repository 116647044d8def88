"""Steps of one sequence at a time through a network of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.backends.drawing import draw
from lmi_multi.engine.batch import Batch, Passage, Prompt, Row, StepResult
from lmi_multi.errors import OptionError


class TransformersExecutor:
    """An `Executor` of a single row, whose keys and values transformers keeps.

    Nothing but drawing is ours, so options mean what they mean everywhere. What the network does
    not keep from step to step, a state of its own kind for one, is computed again each time.
    """

    def __init__(self, network: Any, limits: Limits) -> None:
        self.limits = limits
        self._network = network
        self._known = inspect.signature(network.forward).parameters
        self._tokens: list[int] = []  # of the row that runs
        self._cache: Any = None  # of the first `_cached` of them
        self._cached = 0
        self._memory: Any = None  # what the encoder made of its prompt

    @property
    def device(self) -> str:
        """Where the network is: the GPU's name, or how many threads the CPU uses."""
        used = {str(d) for d in (getattr(self._network, "hf_device_map", None) or {}).values()}
        if len(used) > 1:
            return f"{len(used)} devices"
        where = self._network.device
        if where.type == "cuda":
            return f"{where}, {torch.cuda.get_device_name(where)}"
        threads = torch.get_num_threads()
        return f"{threads} thread{'s' if threads > 1 else ''}"

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepResult:
        """See `Executor.step`."""
        logits = self._decode(batch, logits_to_keep=1)
        drawing = [row for row in batch.rows if row.sample is not None]
        if logits is None or not drawing:
            return StepResult()
        return StepResult(draw(logits[-1:], drawing))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """See `Executor.logits`."""
        logits = self._decode(batch)
        if logits is None:
            raise ValueError("the batch has no rows")
        return logits[-len(batch.rows[0].token_ids) :].cpu()

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """Refused: which of its states are a text's differs from network to network."""
        raise OptionError(
            "a model that runs through transformers encodes and embeds nothing; allowed: generate, "
            "stream, chat, score"
        )

    @torch.inference_mode()
    def score(self, passages: Sequence[Passage]) -> Tensor:
        """See `Executor.score`."""
        parts = []
        for passage in passages:
            memory = None if passage.encoder_ids is None else self._encode(passage.encoder_ids)
            logits = _logits(self._forward(passage.token_ids, memory, use_cache=False))[:-1]
            targets = torch.tensor(passage.token_ids[1:], device=logits.device)
            parts.append(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu())
        return torch.cat(parts) if parts else torch.zeros(0)

    def close(self) -> None:
        """Drop the network and what it keeps, and give a GPU's memory back."""
        self._network = self._cache = self._memory = None
        with suppress(RuntimeError):  # a GPU that has failed gives nothing back
            torch.cuda.empty_cache()

    def _decode(self, batch: Batch, **options: Any) -> Tensor | None:
        """Scores of the row's tokens, or of all that are before them too: float32 [some, vocab]."""
        for prompt in batch.prompts:
            self._memory = self._encode(prompt.token_ids)
        if not batch.rows:
            return None
        [row] = batch.rows
        ids, cache = self._continued(row)
        output = self._forward(ids, self._memory, cache, use_cache=True, **options)
        self._cache = getattr(output, "past_key_values", None)
        self._cached = len(self._tokens)
        return _logits(output)

    def _continued(self, row: Row) -> tuple[Sequence[int], Any]:
        """What the network must read for `row`, and what it has kept of the tokens before. A step
        that is run once more, or another row's, finds nothing kept that fits."""
        cache = self._cache if 0 < row.start == self._cached else None
        self._cache = None  # the network changes it in place: no use if that fails on the way
        self._tokens = [*self._tokens[: row.start], *row.token_ids]
        return (self._tokens if cache is None else row.token_ids), cache

    def _encode(self, ids: Sequence[int]) -> Any:
        inputs = self._tensor(ids)
        encoder = self._network.get_encoder()
        return encoder(input_ids=inputs, attention_mask=torch.ones_like(inputs), return_dict=True)

    def _forward(
        self, ids: Sequence[int], memory: Any = None, cache: Any = None, **options: Any
    ) -> Any:
        inputs = self._tensor(ids)
        if memory is None:
            before = 0 if cache is None else self._cached
            given = {"input_ids": inputs, "attention_mask": inputs.new_ones(1, before + len(ids))}
        else:
            mask = inputs.new_ones(1, memory[0].shape[1])
            given = {"decoder_input_ids": inputs, "encoder_outputs": memory, "attention_mask": mask}
        options |= {"past_key_values": cache} if cache is not None else {}
        wanted = {name: value for name, value in options.items() if name in self._known}
        return self._network(**given, **wanted, return_dict=True)

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._network.device)


def _logits(output: Any) -> Tensor:
    """float32 [tokens, vocab]."""
    logits: Tensor = output.logits[0]
    return logits.float()
