"""What the hardware's compiler cannot take, or would get wrong, looked for in every graph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lmi_multi.errors import BackendError

from .ranges import Interval, reaching, sizes

if TYPE_CHECKING:
    from .lower import Graph

REFUSED = {
    "sort": "sort",
    "while": "loop",
    "conditional": "branch",
    "dynamic-reshape": "dynamic shape",
    "set-dimension-size": "dynamic shape",
    "get-dimension-size": "dynamic shape",
    "rng": "random numbers of the device's own",
    "rng-bit-generator": "random numbers of the device's own",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][a-z0-9-]*)\("
    r"(?P<rest>.*)$"
)
_OPERAND = re.compile(r"(?:^|[ ,])%?([A-Za-z_][\w.-]*)(?=,|$)")  # with or without its shape
_NAMES = re.compile(r"(metadata=\{[^}]*\}|to_apply=[\w.%-]+)")
_SHAPE = re.compile(r"[a-z][a-z0-9]*\[[^\]]*\]")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO text. `shapes` has several entries for a tuple; layouts are left out."""

    name: str
    opcode: str
    shapes: Sequence[str]
    rest: str
    root: bool
    entry: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return _OPERAND.findall(self.rest.partition(")")[0])


def instructions(text: str) -> list[Instruction]:
    """Every instruction of a module in HLO text form."""
    found, entry = [], False
    for line in text.splitlines():
        if line.rstrip().endswith("{") and " = " not in line:
            entry = line.startswith("ENTRY")
        match = _INSTRUCTION.match(line)
        if match:
            shapes = _SHAPE.findall(match["shape"])
            root = match["root"] is not None
            found.append(
                Instruction(match["name"], match["opcode"], shapes, match["rest"], root, entry)
            )
    return found


def faults(text: str, ranks: int) -> Iterator[str]:
    """What is wrong with a module for `ranks` ranks, one line a fault."""
    listed = instructions(text)
    shapes = {i.name: i.shapes[0] for i in listed if i.shapes}
    for i in listed:
        if i.opcode in REFUSED:
            yield f"{i.name}: {REFUSED[i.opcode]}"
        if i.opcode == "custom-call" and "TopK" in i.rest:
            yield f"{i.name}: sort (a custom call of TopK)"
        if i.opcode in ("reduce", "reduce-window") and len(i.shapes) > 1:
            yield f"{i.name}: variadic {i.opcode}"
        if any(shape.startswith(("f64", "c128")) for shape in i.shapes):
            yield f"{i.name}: {i.shapes[0]} has 64-bit floats"
        if any("<=" in shape or "?" in shape for shape in i.shapes):
            yield f"{i.name}: {i.shapes[0]} is a dynamic shape"
        if i.opcode == "constant" and i.shapes[0].startswith(("s64", "u64")):
            yield from _wide_constant(i)
        if i.opcode == "gather":
            yield from _gather(i, shapes)
        if i.opcode in COLLECTIVES:
            yield from _groups(i, ranks)


def _wide_constant(i: Instruction) -> Iterator[str]:
    """The hardware narrows 64-bit integers to 32, and its compiler refuses what does not fit."""
    values = [int(value) for value in re.findall(r"-?\d+", i.rest.partition(")")[0])]
    if any(not -(2**31) <= value < 2**31 for value in values):
        yield f"{i.name}: a constant beyond 32 bits"


def _gather(i: Instruction, shapes: Mapping[str, str]) -> Iterator[str]:
    """A slice that is larger than what it is taken from lies outside whatever its index."""
    slices = re.search(r"slice_sizes=\{([\d,]*)\}", i.rest)
    operand = shapes.get(i.operands[0], "")
    if slices is None or not operand:
        return
    wanted = [int(size) for size in slices[1].split(",") if size]
    if any(a > b for a, b in zip(wanted, sizes(operand), strict=False)):
        yield f"{i.name}: gathers {wanted} out of range of {operand}"


def _groups(i: Instruction, ranks: int) -> Iterator[str]:
    """One group of all ranks, in order."""
    groups = re.search(r"replica_groups=\{(.*?\})?\}", i.rest)
    found = (groups[1] or "") if groups else ""
    wanted = "{" + ",".join(map(str, range(ranks))) + "}"
    if found.replace(" ", "") != wanted:
        yield f"{i.name}: replica groups are {{{found}}}, must be {{{wanted}}}"


def state_faults(graph: Graph) -> Iterator[str]:
    """Every state must come in once and go out in its place, with the same shape."""
    listed = [i for i in instructions(graph.text) if i.entry]
    given = {int(i.rest.partition(")")[0]): i.shapes[0] for i in listed if i.opcode == "parameter"}
    returned = [shape for i in listed if i.root for shape in i.shapes]
    if len(returned) != graph.outputs + len(graph.state):
        yield f"{len(returned)} outputs, not {graph.outputs} and {len(graph.state)} states"
        return
    for name, out in zip(graph.state, returned[graph.outputs :], strict=True):
        places = [i for i, parameter in enumerate(graph.parameters) if parameter == name]
        if len(places) != 1:
            yield f"state {name} is read by {len(places)} inputs, must be one"
        elif given.get(places[0]) != out:
            yield f"state {name} comes in as {given.get(places[0])} and goes out as {out}"


def range_faults(graph: Graph, bounds: Mapping[str, int]) -> Iterator[str]:
    """Gathers and scatters that could reach beyond what they read or write, for inputs that are
    within `bounds`, as the host checks them: see `check_inputs`."""
    known = {
        i: Interval(int(value.min()), int(value.max()))
        for i, value in graph.constants.items()
        if not value.is_floating_point()
    }
    for i, name in enumerate(graph.parameters):
        bound = bounds.get(name.removeprefix("input."))
        if bound is not None and name.startswith("input."):
            known[i] = Interval(0, bound - 1)
    yield from reaching(instructions(graph.text), known)


def check(graph: Graph, ranks: int, bounds: Mapping[str, int]) -> None:
    """Raise BackendError with the graph's tag and its first faults. `bounds` are the trace's."""
    found = [*faults(graph.text, ranks), *state_faults(graph)]
    refuse(graph.tag, found or [*range_faults(graph, bounds)])


def refuse(tag: str, found: Sequence[str]) -> None:
    """Raise BackendError with the graph's tag and the first of the faults that were found."""
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise BackendError(f"graph {tag} cannot run: {'; '.join(found[:3])}{more}")


def rank_faults(first: str, second: str) -> Iterator[str]:
    """Where two ranks' traces of one graph, in HLO's text form, differ but for names: the hardware
    runs one graph on all ranks, so that a rank which is baked into it is wrong on all others."""
    ours, theirs = _nameless(first), _nameless(second)
    if len(ours) != len(theirs):
        yield f"ranks trace {len(ours)} and {len(theirs)} instructions"
        return
    for i, j in zip(ours, theirs, strict=True):
        if i != j:
            yield f"ranks trace {' '.join(map(str, i))} and {' '.join(map(str, j))}"


def _nameless(text: str) -> list[tuple[str, Sequence[str], list[int] | str, str]]:
    """Every instruction with its operands' places instead of their names."""
    listed = instructions(text)
    places = {i.name: place for place, i in enumerate(listed)}
    found = []
    for i in listed:
        given, _, rest = i.rest.partition(")")
        operands = [places[name] for name in i.operands if name in places]
        found.append((i.opcode, i.shapes, operands or given, _NAMES.sub("", rest)))
    return found


def check_same(first: Graph, second: Graph) -> None:
    """Raise BackendError unless two ranks traced the same graph with the same parameters."""
    found = [*rank_faults(first.text, second.text)]
    if list(first.parameters) != list(second.parameters):
        found.append("ranks disagree on its parameters")
    elif not all(first.constants[i].equal(value) for i, value in second.constants.items()):
        found.append("ranks disagree on its constants")
    refuse(first.tag, found)


def check_inputs(tag: str, bounds: Mapping[str, int], inputs: Mapping[str, Tensor]) -> None:
    """Raise BackendError unless every index lies in [0, bound): the device does not look."""
    for name, bound in bounds.items():
        if name in inputs and not 0 <= int(inputs[name].min()) <= int(inputs[name].max()) < bound:
            raise BackendError(f"graph {tag}: {name} leaves the range 0 to {bound - 1}")
