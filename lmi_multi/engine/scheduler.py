"""Continuous batching: which requests take part in the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Batch, Row
from lmi_multi.engine.prefix import PrefixCache
from lmi_multi.engine.request import Request, Share

_pending = attrgetter("pending")


class Scheduler:
    """First come, first served. A request is admitted once every row and block it can ever need
    is free, so that nothing that runs is ever thrown out; a finished one's place is taken at the
    next step. One that begins as another does whose prompt is being computed waits for that."""

    def __init__(self, limits: Limits, prefix_caching: bool = False) -> None:
        self.limits = limits
        self.cache = PrefixCache(limits.blocks, limits.block_size, prefix_caching)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._newcomers: list[Request] = []  # admitted by the last plan, not committed yet
        self.large = False  # whether the last plan has more than `max_step_tokens`, which it may

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def rows(self) -> int:
        """The most rows that the running requests can have."""
        return sum(request.width for request in self.running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it could never run: waiting would not end."""
        needed = sum(request.blocks_needed(self.limits.block_size))
        if needed > self.limits.blocks:
            raise ValueError(
                f"a sequence needs {needed} blocks, the cache has {self.limits.blocks}"
            )
        rows = min(self.limits.max_batch, self.limits.max_step_tokens)
        if request.width > rows:
            raise ValueError(f"a request needs {request.width} rows, a step has {rows}")
        self.waiting.append(request)

    def plan(self) -> tuple[Batch, list[Share]]:
        """The next step, and what each request has of it; shares follow each other as the rows do.

        Running requests come first, so that newcomers' prefill only takes what is left of
        `max_step_tokens`, or of `max_idle_tokens` while there is nothing but prompts; a prompt that
        is longer than that is prefilled in slices. Encoders have as many tokens of their own, but
        take a prompt whole: a longer one is its step's only one.

        What the last plan admitted goes back to the queue unless `commit` has confirmed it: that
        step has failed, or was interrupted.
        """
        self._drop_finished()
        self._requeue_newcomers()
        budget = encoded = most = self._step_tokens()
        counts: list[tuple[Request, int]] = []
        budget -= self._share_alike(budget, counts)
        if not counts:
            for request in sorted(self.running, key=_pending):
                budget -= self._share(request, budget, counts)
        room = self.limits.max_batch - self.rows if self.waiting else 0
        while budget > 0 and (newcomer := self._admit(room, encoded, most)):
            room -= newcomer.width
            encoded -= len(newcomer.encoder_ids or ())
            budget -= self._share(newcomer, budget, counts)
        usual = self.limits.max_step_tokens
        self.large = most > usual < max(most - budget, most - encoded)
        counts.sort(key=lambda share: share[1] > 1)
        shares: list[Share] = [(request, request.rows(count)) for request, count in counts]
        batch = Batch(
            rows=[row for _, rows in shares for row in rows],
            prompts=[r.prompt() for r in self._newcomers if r.encoder_ids is not None],
        )
        return batch, shares

    def _step_tokens(self) -> int:
        """How many the next step may have. A row waits for it if it has one token to compute."""
        waits = any(request.pending == 1 for request in self.running)
        return self.limits.max_step_tokens if waits else self.limits.largest_step

    def _requeue_newcomers(self) -> None:
        while self._newcomers:
            request = self._newcomers[-1]
            if request in self.running:
                self.release(request)
                request.start(0, 0)
                self.waiting.appendleft(request)
            self._newcomers.pop()

    def _drop_finished(self) -> None:
        """Release what ended in a step that never came to its `commit`."""
        for request in [r for r in self.running if r.finish_reason is not None]:
            self.release(request)

    def _share_alike(self, budget: int, counts: list[tuple[Request, int]]) -> int:
        """`_share` for all running requests at once, if each has one token to compute and all of
        them fit in, as in most steps. Else nobody gets anything."""
        wanted = sum([request.tokens_of_step for request in self.running])
        if wanted > budget or {request.pending for request in self.running} != {1}:
            return 0
        counts += [(request, 1) for request in self.running]
        return wanted

    def _share(self, request: Request, budget: int, counts: list[tuple[Request, int]]) -> int:
        """Give a request of what is left, and say how many tokens that takes. Rows beside each
        other, a beam search's, advance together or not at all."""
        rows, pending = request.tokens_of_step, request.pending
        count = pending if pending * rows <= budget else budget // rows
        if count:
            # The only token of one that runs is not a prompt's, or it was left for this step.
            prompt = count > 1 or request in self._newcomers
            left = prompt and count == pending and self._leaves_last(request, counts)
            counts.append((request, count - left))
        return count * rows  # nobody gets a slice of the one token that is left

    def _leaves_last(self, request: Request, counts: Sequence[tuple[Request, int]]) -> bool:
        """Whether the last token of a prompt is for the next step, where it is a row like those
        that run already: a step that draws a newcomer's first token waits for its prefill, or its
        encoder, and so do the tokens of rows that were computed before. Of a newcomer that has but
        one token, as an encoder-decoder's start token, this step then computes none."""
        if not self.limits.begins_ahead or not counts or request.width > 1:
            return False
        first, tokens = counts[0]
        if tokens != 1 or first in self._newcomers:
            return False
        # Of those that run, one that waits in every step would wait for the prefill all the same.
        follows = self.limits.follows
        return request.goes_ahead(follows) and all(own.goes_ahead(follows) for own, _ in counts)

    def _admit(self, room: int, encoded: int, most: int) -> Request | None:
        """Move the first waiting request to the running ones, if there is room for it now.

        `room`: for how many rows. `encoded`: how many tokens the step's encoder may still take, of
        `most`.
        """
        if not self.waiting:
            return None
        request = self.waiting[0]
        if request.width > room:
            return None
        if len(request.encoder_ids or ()) > encoded and encoded < most:
            return None
        own, cross = request.blocks_needed(self.limits.block_size)
        shared = [] if cross else self.cache.find(request.first_tokens)
        if not self.cache.fits(own - len(shared) + cross, shared):
            return None
        if not cross and self._computed_soon(request, len(shared)):
            return None
        # In this order an interrupt leaves nothing that `_requeue_newcomers` could not undo.
        self._newcomers.append(request)
        self.running.append(request)
        self.waiting.popleft()
        self.cache.share(shared, request.blocks)
        self.cache.take(own - len(shared), request.blocks)
        self.cache.take(cross, request.cross_blocks)
        request.start(len(shared) * self.limits.block_size, len(shared))
        return request

    def _computed_soon(self, request: Request, shared: int) -> bool:
        """Whether another request is about to compute the block of the prompt that follows the
        `shared` ones."""
        stop = (shared + 1) * self.limits.block_size
        if not self.cache.enabled or stop >= len(request.first_tokens):
            return False
        wanted = request.first_tokens[:stop]
        return any(
            other.computed < stop
            and other.encoder_ids is None
            and other.first_tokens[:stop] == wanted
            for other in self.running
        )

    def commit(self, shares: Sequence[Share]) -> None:
        """Note what a step computed. Requests that finished since are released."""
        for request, rows in shares:
            row = rows[0]
            request.advance(row.length)
            if row.start < row.prompt_length:
                self._store(request, row)
            if request.finish_reason is not None:
                self.release(request)
        self._newcomers = []

    def _store(self, request: Request, row: Row) -> None:
        """Let others find what a step computed of a prompt. One whose caller left while the step
        ran has no blocks any more."""
        if request.blocks and request.encoder_ids is None:
            self.cache.store(request.first_tokens[: row.length], request.blocks)

    def release(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its blocks. Unknown ones are ignored."""
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        self.cache.give_back(request.blocks)
        self.cache.give_back(request.cross_blocks)
