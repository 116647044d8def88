"""What the scheduler and the engine ask of whatever takes part in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lmi_multi.completion import FinishReason
from lmi_multi.engine.batch import Continuations, Draw, Prompt, Row

if TYPE_CHECKING:
    from lmi_multi.engine import sequence


class Request(Protocol):
    """One prompt on its way: a `Sequence`, or a `BeamSearch` of several rows.

    The first `computed` tokens of each row are in
    the cache, `pending` more can be computed now. `blocks` and `cross_blocks` are the cache blocks
    that belong to it. `finish_reason` is set once it has ended.
    """

    encoder_ids: list[int] | None
    blocks: list[int]
    cross_blocks: list[int]

    @property
    def first_tokens(self) -> list[int]:
        """The tokens that the decoder is given."""

    @property
    def finish_reason(self) -> FinishReason | None: ...

    @property
    def width(self) -> int:
        """The most rows that it can have in a step."""

    @property
    def computed(self) -> int: ...

    @property
    def pending(self) -> int: ...

    @property
    def tokens_of_step(self) -> int:
        """How many tokens a step with one token for each of its rows has."""

    def goes_ahead(self, follows: bool) -> bool:
        """Whether an executor can begin its steps before the host knows the tokens before them.
        `follows`: the executor knows itself which tokens it has drawn, and all options."""

    def blocks_needed(self, size: int) -> tuple[int, int]:
        """The most blocks of `size` tokens that it can need for the decoder's tokens, and those
        for its encoded prompt."""

    def prompt(self) -> Prompt:
        """Its encoder work."""

    def rows(self, count: int) -> list[Row]:
        """Its share of a step that computes `count` more tokens of each of its rows."""

    def accept(self, draws: Iterator[Draw | Continuations]) -> None:
        """Take what is its own from the draws of a step, and see whether it ends. Once it has
        ended, they are only taken off."""

    def advance(self, length: int) -> None:
        """Note that a step has left `length` tokens of each row in the cache."""

    def start(self, reused: int, shared: int) -> None:
        """Note that the first `reused` tokens, and no others, are in the cache: in the first
        `shared` blocks, which hold nothing else."""

    def cancel(self) -> None:
        """End it, unless it has ended: nobody wants its answer."""

    def fail(self, error: str, reason: FinishReason) -> None:
        """End it with an error."""


@dataclass(frozen=True)
class Job:
    """One prompt's requests, and the answers that they fill."""

    requests: Sequence[Request]
    answers: Sequence[sequence.Sequence]


# What one request has of a step. A bare tuple, as one is made for each request of each step.
Share = tuple[Request, Sequence[Row]]


def tokens_of(share: Share) -> int:
    """How many tokens are computed for a request: in its first step the encoder's too, and one of
    the step that is begun meanwhile, if this one has none."""
    request, rows = share
    encoded = request.encoder_ids if rows[0].fresh else None
    return sum(len(row.token_ids) or 1 for row in rows) + len(encoded or ())
