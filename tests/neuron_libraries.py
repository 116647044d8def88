"""Stand-ins for the Neuron libraries, made of their signatures: a call that does not bind fails.

data/neuron_signatures.json has, of each library, where the signatures were read, what its top
exports, the classes' bases, and which keywords a `**kwargs` takes where it would refuse or ignore
all others.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DATA = Path(__file__).with_name("data") / "neuron_signatures.json"


@dataclass(frozen=True)
class Call:
    """A call that was made; `arguments` are those that were given, by their names."""

    name: str
    arguments: Mapping[str, Any]


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, bool]]:
    """Names, kinds, and whether there is a default; without `self` and `cls`, which methods that
    are bound lack."""
    found = inspect.signature(function).parameters.values()
    return [
        (p.name, p.kind, p.default is not p.empty) for p in found if p.name not in ("self", "cls")
    ]


def signatures(library: str) -> dict[str, Callable[..., Any]]:
    """What data/neuron_signatures.json has of a library, by dotted name, as functions."""
    known = json.loads(DATA.read_text())[library]["signatures"]
    # A data file of the tests' own, so nothing foreign is evaluated.
    return {name: eval(f"lambda {text[1:-1]}: None") for name, text in known.items()}  # noqa: S307


def real(library: str, dotted: str) -> Any:
    """The same of the library that is installed."""
    module = importlib.import_module(library)
    parts = dotted.split(".")
    for i, part in enumerate(parts):
        if not hasattr(module, part):
            module = importlib.import_module(f"{library}.{'.'.join(parts[: i + 1])}")
        else:
            module = getattr(module, part)
    return module


class Library:
    """One library's stand-in. `behaviours` say what some of its functions do, by dotted name."""

    def __init__(self, name: str, behaviours: Mapping[str, Callable[..., Any]]) -> None:
        self.name, self.behaviours = name, behaviours
        self.calls: list[Call] = []
        self._data = json.loads(DATA.read_text())[name]
        self._functions = signatures(name)
        self._classes: dict[str, type] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let it be imported until the test ends."""
        top = self._module(monkeypatch, "")
        for dotted in self._functions:
            path, _, last = dotted.rpartition(".")
            if path.rpartition(".")[2][0].isupper():
                owner, _, cls = path.rpartition(".")
                setattr(self._module(monkeypatch, owner), cls, self._class(path))
            else:
                setattr(self._module(monkeypatch, path), last, self._function(dotted))
        for name, dotted in self._data["exports"].items():
            setattr(top, name, self._class(dotted))

    def names(self) -> list[str]:
        """The functions that were called, in order."""
        return [call.name for call in self.calls]

    def _module(self, monkeypatch: pytest.MonkeyPatch, path: str) -> ModuleType:
        name = f"{self.name}.{path}".rstrip(".")
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(self._module(monkeypatch, parent.partition(".")[2]), last, module)
        return sys.modules[name]

    def _class(self, dotted: str) -> type:
        if dotted not in self._classes:
            base = self._data["bases"].get(dotted)
            own = {
                name.removeprefix(f"{dotted}."): self._function(name)
                for name in self._functions
                if name.rpartition(".")[0] == dotted
            }
            for name, function in own.items():
                if "cls" in inspect.signature(function).parameters:
                    own[name] = classmethod(function)
            if "forward" in own:
                own["__call__"] = own["forward"]  # as in a torch.nn.Module
            bases = (self._class(base),) if base else ()
            self._classes[dotted] = type(dotted.rpartition(".")[2], bases, own)
        return self._classes[dotted]

    def _function(self, dotted: str) -> Callable[..., Any]:
        signature = inspect.signature(self._functions[dotted])
        keywords = self._data["keywords"].get(dotted)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            if keywords is not None:
                unknown = set(bound.arguments.get("kwargs", {})) - set(keywords)
                assert not unknown, f"{dotted} has no {unknown}"
            self.calls.append(Call(dotted, bound.arguments))
            behaviour = self.behaviours.get(dotted)
            return None if behaviour is None else behaviour(*args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call
