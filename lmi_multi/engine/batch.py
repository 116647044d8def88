"""What one step computes: plain host data, so that it can cross to another process as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lmi_multi.completion import TokenLogprob
from lmi_multi.ops.beams import Beams
from lmi_multi.ops.sampling import SampleRow


class Row(NamedTuple):
    """One sequence's share of a step: decoder tokens `start` to `start + len(token_ids)`.

    `blocks` are the cache blocks that hold the sequence, in order; `cross_blocks` hold its
    encoded prompt of `cross_length` tokens. `sample` asks for the next token; None while a
    prompt is still being prefilled in slices. The history of a draw is the request's own list of
    tokens, to which it adds what is drawn; a process that it crosses to has it as it was.

    `beams`, in the first of as many rows as it has scores, asks for their best continuations
    instead. Before anything is computed the `fresh` blocks are zeroed and then, for each pair of
    `copies`, the first block is copied to the second.

    `ahead` is what `sample` will be in the step after this one, if the row is in it, has the same
    blocks, and gets the token that this step draws: a hint for an executor that begins the next
    step before anybody has seen that token, which its history lacks until then. None: not known, or
    there is no such step. A slice that leaves but one token of a prompt has an `ahead` too, and
    says with `next_token` which that is. So does, where limits say that steps are begun ahead, a
    newcomer's row that has no tokens at all: its blocks are prepared, and its prompt encoded, in
    this step.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    prompt_length: int
    cross_blocks: Sequence[int] = ()
    cross_length: int = 0
    sample: SampleRow | None = None
    ahead: SampleRow | None = None
    beams: Beams | None = None
    fresh: Sequence[int] = ()
    copies: Sequence[tuple[int, int]] = ()
    next_token: int | None = None

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

    Rows of a single token, or of none, come before longer ones. All keys and values of a layer are
    written before any are read, so a row may attend to blocks that another row fills in the same
    step.
    """

    rows: Sequence[Row] = ()
    prompts: Sequence[Prompt] = field(default=())


class Draw(NamedTuple):
    """The token drawn for a row. `finite` is False if its logits held NaN or inf, or left nothing
    to draw; `logprob` is None unless the row asks for it."""

    token: int
    finite: bool = True
    logprob: TokenLogprob | None = None


class Continuation(NamedTuple):
    """Beam number `beam` with one more `token`; `score` is the sum of processed log-probabilities,
    `logprob` the model's own, if the row asks for it."""

    beam: int
    token: int
    score: float
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Continuations:
    """The best of a search's beams, the best first; fewer than were wanted if no more are
    allowed. `finite` is False if the logits of a beam held NaN or inf."""

    best: Sequence[Continuation]
    finite: bool = True


@dataclass(frozen=True)
class StepResult:
    """What was drawn, in the order of the rows: a `Draw` for each row that asked for a token,
    `Continuations` for each group of rows that are the beams of a search."""

    draws: Sequence[Draw | Continuations] = ()


def groups(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in order, in groups whose sizes sum to at most `limit`; a larger one is alone."""
    group: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(index)
        total += size
    if group:
        yield group
