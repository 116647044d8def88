"""Continuous batching: which sequences take part in the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque

from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Batch
from lmi_multi.engine.cache import BlockAllocator
from lmi_multi.engine.sequence import Sequence


class Scheduler:
    """First come, first served. A sequence is admitted once every block it can ever need is
    free, so that nothing that runs is ever thrown out; a finished one's place is taken at the
    next step."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.allocator = BlockAllocator(limits.blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._newcomers: list[Sequence] = []  # admitted by the last plan, not committed yet

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError if the whole cache could not hold it."""
        needed = sum(self.blocks_needed(sequence))
        if needed > self.limits.blocks:  # waiting for so many would never end
            raise ValueError(
                f"a sequence needs {needed} blocks, the cache has {self.limits.blocks}"
            )
        self.waiting.append(sequence)

    def blocks_needed(self, sequence: Sequence) -> tuple[int, int]:
        """Blocks for its decoder tokens, and for its encoded prompt."""
        size = self.limits.block_size
        # The last token drawn is never fed back, so it needs no place.
        own = -(-(sequence.longest - 1) // size)
        return max(own, 1), -(-len(sequence.encoder_ids or ()) // size)

    def plan(self) -> tuple[Batch, list[Sequence]]:
        """The next step, and the sequence behind each of its rows.

        Running sequences come first, so that newcomers' prefill only takes what is left of
        `max_step_tokens`; a prompt that is longer than that is prefilled in slices. Encoders take
        a prompt whole: one that does not fit beside what runs gets a step for itself.

        What the last plan admitted goes back to the queue unless `commit` has confirmed it: that
        step has failed, or was interrupted.
        """
        self._drop_finished()
        self._requeue_newcomers()
        budget = self.limits.max_step_tokens
        shares: list[tuple[Sequence, int]] = []
        for sequence in sorted(self.running, key=lambda s: len(s.tokens) - s.computed):
            budget -= self._share(sequence, budget, shares)
        while newcomer := self._admit(budget):
            budget -= len(newcomer.encoder_ids or ())
            budget -= self._share(newcomer, budget, shares)
        if not self._newcomers and self._too_long() and (newcomer := self._admit()):
            shares = [(newcomer, 1)]
        shares.sort(key=lambda share: share[1] > 1)
        batch = Batch(
            rows=[sequence.row(count) for sequence, count in shares],
            prompts=[s.prompt() for s in self._newcomers if s.encoder_ids is not None],
        )
        return batch, [sequence for sequence, _ in shares]

    def _requeue_newcomers(self) -> None:
        while self._newcomers:
            sequence = self._newcomers[-1]
            if sequence in self.running:
                self.release(sequence)
                sequence.computed = 0
                self.waiting.appendleft(sequence)
            self._newcomers.pop()

    def _drop_finished(self) -> None:
        """Release what ended in a step that never came to its `commit`."""
        for sequence in [s for s in self.running if s.finish_reason is not None]:
            self.release(sequence)

    def _share(self, sequence: Sequence, budget: int, shares: list[tuple[Sequence, int]]) -> int:
        count = max(0, min(len(sequence.tokens) - sequence.computed, budget))
        if count:
            shares.append((sequence, count))
        return count

    def _too_long(self) -> bool:
        """Whether the first waiting prompt is an encoder's that fits beside nothing that runs."""
        if not self.waiting or self.waiting[0].encoder_ids is None:
            return False
        room = self.limits.max_step_tokens - len(self.running)
        return len(self.waiting[0].encoder_ids) >= room

    def _admit(self, budget: int | None = None) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if there is room for it now.

        `budget`: the step's tokens that are left; None if it may take as many as it has.
        """
        if not self.waiting or len(self.running) >= self.limits.max_batch:
            return None
        sequence = self.waiting[0]
        if budget is not None and len(sequence.encoder_ids or ()) >= budget:
            return None
        own, cross = self.blocks_needed(sequence)
        if own + cross > self.allocator.free:
            return None
        # In this order an interrupt leaves nothing that `_requeue_newcomers` could not undo.
        self._newcomers.append(sequence)
        self.running.append(sequence)
        self.waiting.popleft()
        self.allocator.take(own, sequence.blocks)
        self.allocator.take(cross, sequence.cross_blocks)
        return sequence

    def commit(self, batch: Batch, sequences: list[Sequence]) -> None:
        """Note what a step computed. Sequences that finished since are released."""
        for row, sequence in zip(batch.rows, sequences, strict=True):
            sequence.computed = row.length
            if sequence.finish_reason is not None:
                self.release(sequence)
        self._newcomers = []

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks. Unknown ones are ignored."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        self.allocator.give_back(sequence.blocks)
        self.allocator.give_back(sequence.cross_blocks)
