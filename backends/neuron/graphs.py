"""The graphs of one module: each from the cache, or else from the compiler and into the cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from lmi_multi.backends.ahead_of_time import Count, Progress
from lmi_multi.errors import CheckpointError

from .cache import Cache, Key
from .program import Builder, Compiled, Lowered, Program, Toolchain, Trace

logger = logging.getLogger(__name__)


_Made = tuple[Compiled[Any], bool]


class Graphs(Mapping[str, Compiled[Any]]):
    """Every graph by its tag, made when it is first asked for; `make_all` makes them at once.

    Without a cache all are compiled and none is kept. With `must_keep`, a graph that the cache
    cannot take is an error; otherwise it is a warning, as a model that loads needs no cache.
    """

    def __init__(
        self,
        builder: Builder[Any],
        toolchain: Toolchain,
        traces: Iterable[Trace],
        cache: Cache | None = None,
        must_keep: bool = False,
    ) -> None:
        self._builder, self._toolchain = builder, toolchain
        self._cache, self._keeps, self._must_keep = cache, True, must_keep
        self._told = False
        self._traces = {trace.tag: trace for trace in traces}
        self._made: dict[str, Compiled[Any]] = {}
        self.count = Count(len(self._traces))

    def __len__(self) -> int:
        return len(self._traces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._traces)

    def __getitem__(self, tag: str) -> Compiled[Any]:
        if tag not in self._made:
            self._add(*self._find_or_compile(self._builder.lower(self._traces[tag])))
        return self._made[tag]

    def assemble(self) -> Program:
        """A program of these graphs: see `Builder.assemble`."""
        return self._builder.assemble(self)

    def make_all(self, jobs: int, progress: Progress | None = None) -> None:
        """Make every graph, `jobs` at a time; they are traced one after another meanwhile.

        The first failure ends it, after what is being compiled is in the cache; so does an
        interrupt. Raises what the builder raises, and with `must_keep` CheckpointError.
        """
        pool = ThreadPoolExecutor(jobs, "compile")
        running: set[Future[_Made]] = set()
        try:
            for tag in [tag for tag in self if tag not in self._made]:
                while len(running) >= 2 * jobs:  # traced graphs take memory
                    running = self._collect(running, progress)
                lowered = self._builder.lower(self._traces[tag])
                running.add(pool.submit(self._find_or_compile, lowered))
            while running:
                running = self._collect(running, progress)
        finally:
            pool.shutdown(cancel_futures=True)

    def _collect(
        self, running: set[Future[_Made]], progress: Progress | None
    ) -> set[Future[_Made]]:
        """Take what has become ready; returns what has not."""
        ready, rest = wait(running, return_when=FIRST_COMPLETED)
        for future in ready:
            compiled, hit = future.result()
            self._add(compiled, hit)
            if progress is not None:
                progress(self.count, compiled.graph.tag)
        return rest

    def _add(self, compiled: Compiled[Any], hit: bool) -> None:
        self._made[compiled.graph.tag] = compiled
        self.count.done += 1
        self.count.hits += hit

    def _find_or_compile(self, graph: Lowered) -> _Made:
        """The compiled graph, and whether the cache had it."""
        key = Key(graph.tag, graph.digest, self._toolchain)
        found = None if self._cache is None else self._cache.find(key)
        if found is not None:
            return Compiled(graph, found), True
        self._tell(graph.tag)
        binary = self._builder.compile(graph)
        if self._cache is not None and self._keeps:
            self._keep(self._cache, key, binary)
        return Compiled(graph, binary), False

    def _tell(self, tag: str) -> None:
        """Say, once a model that loads, that graphs are compiled now, and which are not used."""
        if self._must_keep or self._told:
            return
        self._told = True
        logger.info(
            "graph %s of %d is not cached and is compiled now; compile them ahead with "
            "`lmi-multi compile`",
            tag,
            len(self),
        )
        if self._cache is not None:
            self._cache.tell_others()

    def _keep(self, cache: Cache, key: Key, binary: bytes) -> None:
        try:
            cache.put(key, binary)
        except CheckpointError as error:
            if self._must_keep:
                raise
            self._keeps = False
            logger.warning("%s; what is compiled now will be compiled again next time", error)
