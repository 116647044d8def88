"""What one step computes: plain host data, so that it can cross to another process as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmi_multi.ops.sampling import SampleRow
from lmi_multi.options import TokenLogprob


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step: decoder tokens `start` to `start + len(token_ids)`.

    `blocks` are the cache blocks that hold the sequence, in order; `cross_blocks` hold its
    encoded prompt of `cross_length` tokens. `sample` asks for the next token; None while a
    prompt is still being prefilled in slices.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    prompt_length: int
    cross_blocks: Sequence[int] = ()
    cross_length: int = 0
    sample: SampleRow | None = None

    @property
    def length(self) -> int:
        """Tokens of context after this step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class Prompt:
    """One prompt for the encoder; its cross-attention K/V go to `cross_blocks`, if any."""

    token_ids: Sequence[int]
    segment_ids: Sequence[int] | None = None
    cross_blocks: Sequence[int] = ()


@dataclass(frozen=True)
class Passage:
    """Known decoder tokens, to be scored in one go; `encoder_ids` for an encoder-decoder."""

    token_ids: Sequence[int]
    encoder_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Batch:
    """One step: first the prompts are encoded, then every row's tokens are decoded.

    Rows of a single token come before longer ones.
    """

    rows: Sequence[Row] = ()
    prompts: Sequence[Prompt] = field(default=())


@dataclass(frozen=True)
class StepResult:
    """The token drawn for each row that asked for one, in row order; False in `finite` marks a
    row whose logits held NaN or inf, or left nothing to draw. `logprobs` has an entry for each of
    them too, None where a row did not ask; it is empty when none did."""

    tokens: Sequence[int]
    finite: Sequence[bool]
    logprobs: Sequence[TokenLogprob | None] = ()
