"""What a backend that compiles graphs can do ahead of time, without the hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel

from lmi_multi.checkpoint.artifact import Artifact

if TYPE_CHECKING:
    from lmi_multi.fit import Network


@dataclass
class Count:
    """How many graphs there are, how many of them are ready, and how many of these were cached."""

    total: int
    done: int = 0
    hits: int = 0


Progress = Callable[[Count, str], None]
"""Called with the counts and the name of the graph that has just become ready."""


@dataclass(frozen=True)
class Compilation:
    """What `AheadOfTime.compile` did, and the place where the graphs lie."""

    count: Count
    place: str


class GraphCount(BaseModel):
    """One graph: its name, and how many HLO instructions it has; None where none were counted."""

    name: str
    instructions: int | None


class GraphPlan(BaseModel):
    """The graphs of a model on an instance, and the estimated bytes of each core by what they are
    for. `buckets` are the sizes that graphs are made for; `uncounted` says why instructions were
    not counted, if they were not."""

    instance: str
    tensor_parallel: int
    max_batch: int
    max_tokens: int
    core_bytes: dict[str, int]
    device_bytes: int
    buckets: dict[str, list[int]]
    graphs: list[GraphCount]
    uncounted: str | None


class AheadOfTime(Protocol):
    """A `Backend` that runs compiled graphs."""

    def plan(
        self,
        network: Network,
        *,
        instance: str,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
        progress: Progress | None = None,
    ) -> GraphPlan:
        """What `load` on `instance` would compile, without compiling it. Raises OptionError, and
        CapacityError if the model does not fit."""

    def check(
        self,
        *,
        instance: str,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
        quantize: str | None = None,
        cache: str | Path | None = None,
        jobs: int | None = None,
        network: Network | None = None,
    ) -> None:
        """Raise what `compile` would for these of `network`, or without one of any: OptionError for
        what is not valid, CapacityError for what does not fit, BackendError where nothing can
        compile here. For who has to download or convert the model first."""

    def compile(
        self,
        artifact: Artifact,
        *,
        instance: str,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
        cache: str | Path | None = None,
        jobs: int | None = None,
        progress: Progress | None = None,
    ) -> Compilation:
        """Compile every graph that `load` wants on `instance`, `jobs` at once (None: one for each
        CPU core), into `cache`, a folder or `s3://BUCKET/PREFIX` (None: where `load` looks).

        What the cache holds already is not compiled again. Raises OptionError, CapacityError if
        the model does not fit the instance, BackendError that names the graph which cannot be
        compiled, and CheckpointError if the cache cannot be read or written.
        """
