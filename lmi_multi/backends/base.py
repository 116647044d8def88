"""What a backend is: where a model runs, and how one step of it is executed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.engine.batch import Batch, Passage, Prompt, StepResult


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here; if not, why, and one line that says what to do."""

    name: str
    ok: bool
    reason: str
    remedy: str = ""
    devices: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Limits:
    """What an executor was built for.

    `max_batch` rows run at once; `max_tokens` bounds prompt plus generated tokens of a sequence
    (encoder-decoders: each of prompt and generated tokens); `max_step_tokens` bounds the tokens
    of one step, an encoder's by themselves, so that prefill never stalls running rows for long,
    and `max_idle_tokens`, if that is more, those of a step that no running row waits for; the cache
    holds `blocks` blocks of `block_size` tokens. Without `beams` it cannot copy blocks,
    which beam search needs. One that `begins_ahead` starts a step before the last one's tokens are
    read: it had better not wait for a newcomer's first token while others run. Without `follows`
    it does so for rows whose draw needs nothing but logits; one that `follows` keeps the tokens
    that it has drawn, and draws by all options, those that depend on earlier tokens included (but
    for searches).
    """

    max_batch: int
    max_tokens: int
    max_step_tokens: int
    blocks: int
    block_size: int
    max_idle_tokens: int = 0
    beams: bool = True
    begins_ahead: bool = False
    follows: bool = False

    @property
    def largest_step(self) -> int:
        """Tokens of any step."""
        return max(self.max_step_tokens, self.max_idle_tokens)


class Executor(Protocol):
    """One loaded model. Not thread-safe: the engine serializes its calls."""

    @property
    def limits(self) -> Limits:
        """What it was built for."""

    @property
    def device(self) -> str:
        """The device in words, for people."""

    def step(self, batch: Batch) -> StepResult:
        """Encode the batch's prompts, decode its rows, and draw the tokens that rows ask for."""

    def logits(self, batch: Batch) -> Tensor:
        """Like `step`, but returns the scores of every packed token: float32 [tokens, vocab]."""

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """The last hidden states float32 [tokens, hidden], packed: the encoder's, or those of a
        decoder without one; and pooled float32 [rows, hidden] where the network has a pooler."""

    def score(self, passages: Sequence[Passage]) -> Tensor:
        """Log-probability of every token but each passage's first: float32, packed."""

    def close(self) -> None:
        """Free everything. Calling it twice is fine."""


class Backend(Protocol):
    """A kind of hardware. Registered by name in `lmi_multi.backends`."""

    @property
    def name(self) -> str:
        """As in `load(backend=...)`."""

    def probe(self) -> Availability:
        """Look at this machine; cheap, and never raises."""

    def check_load(
        self, *, tensor_parallel: int, pipeline_parallel: int, quantize: str | None
    ) -> None:
        """Raise what `load` would for these of any model: for who has to convert the model first.
        What only a network can refuse, as its number of stages, is left to `load`."""

    def load(
        self,
        artifact: Artifact,
        *,
        tensor_parallel: int,
        pipeline_parallel: int = 1,
        max_batch: int | None,
        max_tokens: int | None,
        memory_share: float | None = None,
    ) -> Executor:
        """Load the model over tensor_parallel x pipeline_parallel ranks. None lets the backend
        choose.

        `memory_share` is the part of a device's memory, above 0 and at most 1, that the model may
        take in all. Raises CapacityError if it cannot fit, OptionError for what cannot be,
        OptionError or BackendError for a way to split it that the network or the hardware does not
        allow.
        """
