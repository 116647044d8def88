"""The engine in a process of its own: `python -m lmi_multi.serve.worker FD LOG_FORMAT`.

It reads what the server wants from a pipe between two steps, and writes what each step brought.
Nothing of HTTP happens here, so nothing of HTTP slows a step.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children
from multiprocessing.connection import Connection, wait

import torch

import lmi_multi
from lmi_multi.embedding import Pooling
from lmi_multi.engine.request import Job
from lmi_multi.errors import LmiError, OptionError, RankError
from lmi_multi.model import Model, batches
from lmi_multi.models.traits import Traits
from lmi_multi.options import GenerateOptions
from lmi_multi.serve import logs, wire
from lmi_multi.serve.script import OUT_OF_MEMORY, serve_script
from lmi_multi.streaming import Chunk, View

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds to end in good order once the server is gone


@dataclass
class _Answering:
    """A prompt, and how much of its answers was told. Without `stream` that is all at the end."""

    job: Job
    views: list[View]
    stream: bool
    started: bool = False
    first: bool = False

    def starts(self) -> bool:
        """Whether it has left the queue since the last call."""
        begins = not self.started and self.job.requests[0].computed > 0
        self.started |= begins
        return begins

    def begins(self) -> bool:
        """Whether it has got its first token since the last call."""
        begins = not self.first and any(len(a.tokens) > a.given for a in self.job.answers)
        self.first |= begins
        return begins

    def fresh(self) -> list[Chunk]:
        """What its answers have that was not told yet."""
        views = (v for v in self.views if self.stream or v.sequence.finish_reason is not None)
        return [chunk for view in views if (chunk := view.fresh())]

    @property
    def ended(self) -> bool:
        """Whether everything was told."""
        return all(view.ended for view in self.views)


@dataclass
class _Embedding:
    """Texts of a request, what they are to become, and the vectors of those that are done."""

    number: int
    ids: list[list[int]]
    pooling: Pooling
    normalize: bool
    pieces: Iterator[list[int]]
    vectors: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, message: wire.Message, most: int) -> _Embedding:
        """What a message asks for, in pieces of at most so many tokens."""
        ids = message["ids"]
        pieces = batches([len(own) for own in ids], most)
        return cls(message["id"], ids, message["pooling"], message["normalize"], pieces)

    @property
    def ended(self) -> bool:
        """Whether every text has its vector."""
        return len(self.vectors) == len(self.ids)

    def advance(self, model: Model) -> None:
        """Embed the next piece."""
        piece = [self.ids[index] for index in next(self.pieces)]
        self.vectors += model.embed(piece, self.pooling, self.normalize).tolist()


class Worker:
    """Steps the engine for as long as anybody wants something of it; between two steps, a step's
    worth of texts is embedded, so that neither keeps the other waiting."""

    def __init__(self, model: Model, pipe: Connection) -> None:
        self._model = model
        self._engine = model._engine
        self._pipe = pipe
        self._answering: dict[int, _Answering] = {}
        self._embedding: deque[_Embedding] = deque()
        self._steps = 0

    def run(self) -> None:
        """Serve until the server closes the pipe. Raises what a step raises."""
        while True:
            try:
                if not self._answering and not self._embedding:
                    self._wait()
                while self._pipe.poll():
                    self._handle(wire.receive(self._pipe))
                if self._answering:
                    self._step()
                if self._embedding:
                    self._embed()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                return

    def _wait(self) -> None:
        """Until the server says something. Raises RankError if a rank ends meanwhile."""
        ranks = {rank.sentinel: rank.name for rank in active_children()}
        ready = wait([self._pipe, *ranks])
        for rank in ranks.keys() & ready:
            raise RankError(f"{ranks[rank]} died")

    def _handle(self, message: wire.Message) -> None:
        number = message["id"]
        try:
            if message["type"] == "cancel":
                self._drop(number)
                wire.send(self._pipe, {"type": "state", **self._state()})
            elif message["type"] == "embed":
                self._embedding.append(_Embedding.of(message, self._model.limits.max_step_tokens))
            else:
                self._submit(message)
        except OptionError as error:
            wire.send(self._pipe, {"type": "refused", "id": number, "error": str(error)})

    def _submit(self, message: wire.Message) -> None:
        options = GenerateOptions.of(message["options"])
        # Not `streaming`: text is the server's to make, but for stop strings.
        job = self._model._reader.job(0, message["ids"], options)
        self._engine.submit(job.requests)
        views = [View(0, answer) for answer in job.answers]
        self._answering[message["id"]] = _Answering(job, views, message["stream"])

    def _drop(self, number: int) -> None:
        answering = self._answering.pop(number, None)
        if answering is not None:
            self._engine.drop(answering.job.requests)
        self._embedding = deque(own for own in self._embedding if own.number != number)

    def _embed(self) -> None:
        own = self._embedding[0]
        try:
            own.advance(self._model)
        except OptionError as error:
            self._drop(own.number)
            wire.send(self._pipe, {"type": "refused", "id": own.number, "error": str(error)})
            return
        if own.ended:
            self._embedding.popleft()
            message = {"type": "embedded", "id": own.number, "vectors": own.vectors}
            wire.send(self._pipe, message)
        else:
            wire.send(self._pipe, {"type": "state", **self._state()})

    def _step(self) -> None:
        began = time.time_ns()
        self._engine.step()
        self._steps += 1
        own = [*self._answering.items()]
        message: wire.Message = {
            "type": "step",
            "began": began,
            "started": [number for number, answering in own if answering.starts()],
            "first": [number for number, answering in own if answering.begins()],
            "chunks": [(number, wire.pack(c)) for number, a in own for c in a.fresh()],
            "ended": [number for number, answering in own if answering.ended],
        }
        for number in message["ended"]:
            self._drop(number)
        wire.send(self._pipe, message | self._state())

    def _state(self) -> dict[str, int]:
        scheduler = self._engine.scheduler
        return {
            "rows": scheduler.rows,
            "waiting": len(scheduler.waiting),
            "blocks": scheduler.limits.blocks - scheduler.cache.free,
            "steps": self._steps,
        }


def ready(model: Model) -> wire.Message:
    """What the server needs to know of a model to check and tokenize prompts by itself."""
    return {
        "type": "ready",
        "folder": str(model.artifact.folder),
        "traits": asdict(Traits.of(model.spec)),
        "limits": asdict(model.limits),
        "backend": model.backend,
        "device": model.device,
    }


def _leave_a_core() -> None:
    """Torch's threads wait for each other in busy loops: one that has to share its core with the
    server's process makes all of them wait at every product."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def _end_with_server(pipe: Connection) -> None:
    """A thread: once the server is gone, however it ended, so is this process with all that it has
    started, also in the midst of a call that never returns."""
    hung_up = select.poll()
    hung_up.register(pipe.fileno(), 0)  # nothing is read, the end is always told
    hung_up.poll()
    time.sleep(PATIENCE)
    try:
        os.killpg(os.getpid(), signal.SIGKILL)
    except ProcessLookupError:  # it leads no group: somebody runs it by hand
        os._exit(1)


def main() -> None:
    """Load what the first message says, then serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and SIGTERM are the server's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    logs.set_up(sys.argv[2], logging.WARNING)
    os.set_inheritable(pipe.fileno(), False)
    os.dup2(2, 1)  # whatever is printed here is no answer
    threading.Thread(target=_end_with_server, args=(pipe,), daemon=True).start()
    _leave_a_core()
    try:
        wanted = wire.receive(pipe)
        if "script" in wanted:
            serve_script(pipe, **wanted)
            return
        model = lmi_multi.load(**wanted)
        wire.send(pipe, ready(model))
        Worker(model, pipe).run()
        model.close()
    except BaseException as error:
        _say_broken(pipe, error)  # first of all: what is left the server ends
        sys.exit(1)


def _say_broken(pipe: Connection, error: BaseException) -> None:
    line = str(error) if isinstance(error, LmiError) else f"{type(error).__name__}: {error}"
    if not isinstance(error, LmiError):
        log.error("the engine failed", exc_info=error)
    try:
        memory = isinstance(error, OUT_OF_MEMORY)
        wire.send(pipe, {"type": "broken", "error": line, "memory": memory})
    except OSError:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
