"""Recording work as a CUDA graph: on one GPU, or on several together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmi_multi import interrupts, progress
from lmi_multi.parallel.collectives import Peers

from .program import NotCoveredError

Made = TypeVar("Made")
# torch captures one graph at a time in a process, which may hold several models.
_CAPTURING = threading.Lock()
# What can become of a capture on one of several ranks, the worst first.
_NOT_COVERED, _NO_MEMORY, _DONE = range(3)


@dataclass(frozen=True)
class Captured:
    """A graph, and the tensor that holds what it computes after a replay."""

    graph: torch.cuda.CUDAGraph
    out: Tensor

    def replay(self) -> Tensor:
        """Run it on the current stream."""
        self.graph.replay()
        return self.out


def capture(body: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any) -> Captured:
    """Run `body` once on `stream`, so that all it sets up is there, and record it; its memory is
    of `pool`, a handle of torch's.

    Raises torch.OutOfMemoryError also where it is the driver that has none left for a graph.
    """
    with _CAPTURING, interrupts.delayed():
        run(body, stream)
        with progress.waiting():  # capturing begins with it anyway: other ranks' part of `body`
            stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may load models and compute meanwhile.
        recording = torch.cuda.graph(
            graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        try:
            # torch leaves its stream the current one where a capture does not end well.
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                out = body()
        except RuntimeError as error:
            if "out of memory" not in f"{error} {error.__context__}":
                raise
            raise torch.OutOfMemoryError(str(error)) from error
        return Captured(graph, out)


def run(body: Callable[[], Tensor], stream: torch.cuda.Stream) -> None:
    """Run `body` on `stream`, after what the current one has and before what it gets."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            body()
    finally:  # also for what had begun when memory was missing: the kernels' scratch is shared
        current.wait_stream(stream)


def capture_together(
    body: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any, peers: Peers
) -> Captured:
    """`capture` on every rank, or on none.

    Ranks first capture a muted `body`, so that memory is found, or is missing, while nobody waits
    in the middle of a step for one that has given up. Raises what the worst off of them raised, on
    every rank: NotCoveredError or torch.OutOfMemoryError.
    """
    if peers.alone:
        return capture(body, stream, pool)

    def rehearse() -> Captured:
        captured = capture(body, stream, pool)
        run(body, stream)  # it will run again before it is captured again, beside this graph
        return captured

    with peers.muted():
        rehearsed = on_all(rehearse, peers).graph
    captured = on_all(lambda: capture(body, stream, pool), peers)
    del rehearsed  # not before: torch gives up a pool that no graph is of
    return captured


def on_all(work: Callable[[], Made], peers: Peers) -> Made:
    """What `work` returns, which is not None, if it can be done on every rank. Else all raise
    NotCoveredError or torch.OutOfMemoryError."""
    done, outcome = None, _DONE
    try:
        done = work()
    except NotCoveredError:
        outcome = _NOT_COVERED
    except torch.OutOfMemoryError:
        outcome = _NO_MEMORY
    worst = peers.least(outcome)
    if worst == _NOT_COVERED:
        raise NotCoveredError
    if done is None or worst == _NO_MEMORY:
        raise torch.OutOfMemoryError("a rank has no memory for this graph")
    return done
