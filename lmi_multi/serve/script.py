"""A script of the user's own in the engine's process: its `handle` answers each request in turn."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lmi_multi import fastertransformer
from lmi_multi.checkpoint.s3.address import is_address
from lmi_multi.checkpoint.source import resolve
from lmi_multi.errors import CapacityError, LmiError, OptionError
from lmi_multi.serve import djl_python, wire
from lmi_multi.serve.djl_python import Input, Output, inputs, outputs

# What scripts import that were written for other containers, and who answers here.
_STAND_INS: Mapping[str, ModuleType] = {
    "djl_python": djl_python,
    "djl_python.inputs": inputs,
    "djl_python.outputs": outputs,
}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")  # of a header
_VALUE = re.compile(r"[\t -~]{0,4000}")
_OWN = ("content-length", "transfer-encoding", "connection")  # the server's to say
_WITHOUT_CONTENT = (204, 205, 304)  # by HTTP: more than a head would be read as the next answer
OUT_OF_MEMORY = (CapacityError, MemoryError, torch.OutOfMemoryError)


def serve_script(pipe: Connection, script: str, properties: dict[str, str]) -> None:
    """Load `script`, let it load its model, then answer until the server closes the pipe.

    A model on S3 is downloaded first: the script gets the folder. Raises LmiError if it has no
    `handle`, and what the script raises before it has answered anything.
    """
    if is_address(properties.get("model_id", "")):
        properties = properties | {"model_id": str(resolve(properties["model_id"]).folder)}
    module = _load(Path(script))
    handle = getattr(module, "handle", None)
    if not callable(handle):
        raise LmiError(f"{script} has no function handle(inputs)")
    handle(_input(b"", properties))  # without content: load the model
    wire.send(pipe, {"type": "ready"})
    _Worker(pipe, Path(script).name, handle, properties).run()


def _load(path: Path) -> ModuleType:
    sys.modules |= _STAND_INS
    if importlib.util.find_spec("fastertransformer") is None:
        sys.modules["fastertransformer"] = fastertransformer
    sys.path.insert(0, str(path.parent))  # what lies beside it can be imported
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise LmiError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _input(content: bytes, properties: Mapping[str, str]) -> Input:
    made = Input()
    made.properties.update(properties)
    if content:
        made.content.add("data", content)
    return made


class _Worker:
    """Takes what the server sends in order; a request that is cancelled in time is left out."""

    def __init__(
        self, pipe: Connection, name: str, handle: Any, properties: Mapping[str, str]
    ) -> None:
        self._pipe, self._name, self._handle, self._properties = pipe, name, handle, properties
        self._waiting: deque[wire.Message] = deque()
        self._running: int | None = None  # None as well when its stream is not wanted any more

    def run(self) -> None:
        """Answer until the server closes the pipe."""
        try:
            while True:
                while not self._waiting or self._pipe.poll():
                    self._take(wire.receive(self._pipe))
                self._answer(self._waiting.popleft())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return

    def _take(self, message: wire.Message) -> None:
        if message["type"] == "invoke":
            self._waiting.append(message)
            return
        number = message["id"]
        self._waiting = deque(m for m in self._waiting if m["id"] != number)
        if number == self._running:
            self._running = None

    def _answer(self, message: wire.Message) -> None:
        self._running = message["id"]
        self._say_busy(True)
        output: Output | None = None
        try:
            # The options come last: no header may pass for one of them.
            given = message["properties"] | self._properties
            output = self._handle(_input(wire.content(message["content"]), given))
            for part in self._parts(output):
                wire.send(self._pipe, {"type": "output", "id": message["id"], **part})
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            failure = self._failure(error) | {"type": "output", "id": message["id"], "last": True}
            wire.send(self._pipe, failure)
        if isinstance(output, Output):
            self._finish(output)
        self._running = None
        self._say_busy(False)

    def _finish(self, output: Output) -> None:
        """What the script wants done once its answer has gone; nobody waits to hear of it."""
        try:
            output.finished()
        except Exception as error:
            traceback.print_exception(error)

    def _parts(self, output: object) -> Iterator[dict[str, Any]]:
        """An output as messages. Only the first has a status and headers."""
        if output is None:
            yield {"code": 204, "headers": {}, "content": "", "last": True}
            return
        if not isinstance(output, Output):
            raise TypeError(f"handle returned a {type(output).__name__}; allowed: Output or None")
        head = {"code": _status(output.code), "headers": _headers(output.properties)}
        content = b"" if output.streams else _body(output)
        if output.code in _WITHOUT_CONTENT and (content or output.streams):
            raise ValueError(f"the output's code is {output.code}, which goes without content")
        if not output.streams:
            yield head | {"content": wire.text(content), "last": True}
            return
        yield head | {"content": "", "last": False}
        for part in output.parts():
            while self._pipe.poll():
                self._take(wire.receive(self._pipe))
            if self._running is None:
                return
            yield {"content": wire.text(part), "last": False}
        yield {"content": "", "last": True}

    def _failure(self, error: Exception) -> dict[str, Any]:
        """What the client hears of an error; the log has the rest."""
        traceback.print_exception(error)
        code = 424  # DJL's for a handler that fails
        if isinstance(error, OUT_OF_MEMORY):
            code = 507
        elif isinstance(error, OptionError):
            code = 400
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
        return {"code": code, "error": f"{self._name} failed with {said}"}

    def _say_busy(self, busy: bool) -> None:
        state = {"rows": int(busy), "waiting": len(self._waiting), "blocks": 0, "steps": 0}
        wire.send(self._pipe, {"type": "state", **state})


def _status(code: object) -> int:
    if type(code) is not int or not 200 <= code <= 599:
        raise ValueError(f"the output's code is {code!r:.80}; allowed: an integer from 200 to 599")
    return code


def _headers(properties: Mapping[str, object]) -> dict[str, str]:
    for name, value in properties.items():
        if not (_NAME.fullmatch(str(name)) and _VALUE.fullmatch(str(value))):
            raise ValueError(f"the output's property {name!r:.80} is {value!r:.80}: no header")
    named = {str(name).lower(): str(value) for name, value in properties.items()}
    return {name: value for name, value in named.items() if name not in _OWN}


def _body(output: Output) -> bytes:
    """The one content, or the one that is called `data`."""
    content = output.content
    if content.is_empty():
        return b""
    named = content.get("data")
    if named is None and content.size() > 1:
        raise ValueError(f"the output has {content.size()} contents; allowed: one, or one 'data'")
    return content.value_at(0) if named is None else named
