"""Steps the executor until every request that was submitted has its answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor

from lmi_multi import interrupts
from lmi_multi.backends.base import Executor
from lmi_multi.engine.batch import Passage, Prompt
from lmi_multi.engine.request import Request, Share, tokens_of
from lmi_multi.engine.scheduler import Scheduler
from lmi_multi.errors import CapacityError, OptionError, first_line

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class Engine:
    """One executor shared by any number of callers and threads.

    There is no thread of its own: whoever waits for an answer drives the steps, and each step
    carries everybody's requests. While one caller's step runs the others wait, come and go.
    """

    def __init__(self, executor: Executor, prefix_caching: bool = False) -> None:
        self.executor = executor
        self.scheduler = Scheduler(executor.limits, prefix_caching)
        # Guards all but the executor, which `_user` has to itself. Used by itself, not through
        # its condition: an interrupt on the way into `with condition` leaves it locked for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # notified when the executor is free
        self._user: object | None = None
        self._steps = 0
        self._closed = False

    def run(self, requests: Iterable[Request]) -> None:
        """Drive `requests` to their end. Whatever ends this early frees their places."""
        for _ in self.steps(requests):
            pass

    def steps(self, requests: Iterable[Request]) -> Generator[None]:
        """Like `run`, pausing after every step, one's own or another caller's.

        Closing the iterator frees their places.
        """
        own = pending = list(requests)
        seen = self._steps
        try:
            self.submit(own)
            while pending:
                if self._steps == seen:  # what others' steps brought is shown first
                    self._use(self._step, unless=partial(self._stepped_since, seen))
                seen = self._steps
                pending = [r for r in pending if r.finish_reason is None]
                yield
        finally:
            self.drop(own)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue `requests`, for whoever steps next. They stay until they have ended, or `drop`."""
        with interrupts.delayed(), self._lock:
            for request in requests:
                self.scheduler.add(request)

    def step(self) -> None:
        """Run one step, which carries everybody's requests."""
        self._use(self._step)

    def drop(self, requests: Iterable[Request]) -> None:
        """Free the places of `requests`; those that have not ended are cancelled."""
        with interrupts.delayed(), self._lock:
            for request in requests:
                request.cancel()
                self.scheduler.release(request)

    def encode(self, prompts: Items[Prompt]) -> tuple[Tensor, Tensor | None]:
        """`Executor.encode`, between two steps. Raises CapacityError where memory is short."""
        with _room("encode", prompts):
            return cast(
                "tuple[Tensor, Tensor | None]", self._use(lambda: self.executor.encode(prompts))
            )

    def score(self, passages: Items[Passage]) -> Tensor:
        """`Executor.score`, between two steps. Raises CapacityError where memory is short."""
        with _room("score", passages):
            return cast(Tensor, self._use(lambda: self.executor.score(passages)))

    def close(self) -> None:
        """Close the executor once the step that runs has ended; who still waits gets an error."""
        with self._lock:
            self._changed.wait_for(lambda: self._user is None)
            self._closed = True
            try:
                self.executor.close()
            finally:
                self._changed.notify_all()

    def _use(self, work: Callable[[], _T], unless: Callable[[], bool] = lambda: False) -> _T | None:
        """What `work` returns with the executor to itself; None, not done, if `unless` holds then.

        Raises OptionError if the model has been closed.
        """
        me = object()
        try:
            with self._lock:
                self._changed.wait_for(lambda: self._user is None or unless())
                if unless():
                    return None
                if self._closed:
                    raise OptionError("the model is closed")
                self._user = me
            return work()
        finally:  # of an interrupt as well, wherever it came; another one waits
            if self._user is me:
                with interrupts.delayed(), self._lock:
                    self._free()

    def _step(self) -> None:
        with interrupts.delayed(), self._lock:
            batch, shares = self.scheduler.plan()
        try:
            draws = iter(self.executor.step(batch).draws)
        except torch.OutOfMemoryError as error:
            with interrupts.delayed(), self._lock:
                self._make_room(shares, error)
            return
        with interrupts.delayed(), self._lock:
            for request, rows in shares:
                if rows[0].sample is not None:
                    request.accept(draws)
            self.scheduler.commit(shares)
            self._steps += 1
            self._free()  # in here, as holding interrupts back once more takes longer than that

    def _free(self) -> None:
        """Let another one use the executor."""
        self._user = None
        self._changed.notify_all()

    def _make_room(self, shares: Items[Share], error: torch.OutOfMemoryError) -> None:
        """Let the next step be smaller than this one, which did not fit the GPU. Sizes are planned
        so that this does not happen: another process has taken memory, or the plan is wrong. Ranks
        do not come here: where one is short of memory the others are amid the step."""
        limits, fault = self.scheduler.limits, str(error).splitlines()[0]
        if self.scheduler.large:
            self.scheduler.limits = replace(limits, max_idle_tokens=0)
            usual = limits.max_step_tokens
            log.error("a large step does not fit the GPU: %s; none has over %d now", fault, usual)
        else:
            self._give_up_one(shares, fault)
        self._steps += 1

    def _give_up_one(self, shares: Items[Share], fault: str) -> None:
        """Fail the request that wanted most of a step, the latest of several; the others take the
        step again."""
        largest, _ = max(reversed(shares), key=tokens_of)
        message = f"a step with it does not fit the GPU: {fault}"
        log.error("%s; %d others go on", message, len(shares) - 1)
        largest.fail(message, "out_of_memory")
        self.scheduler.release(largest)

    def _stepped_since(self, seen: int) -> bool:
        return self._steps != seen


@contextmanager
def _room(what: str, items: Items[object]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            f"there is no memory to {what} {len(items)} at once, fewer or shorter ones need less: "
            f"{first_line(error)}"
        ) from None
