"""Where a graph's gathers and scatters can reach: whole numbers followed as intervals through HLO.

Every instruction gets the interval that its numbers lie in whatever the inputs are, from the bounds
of those that the host checks (`Trace.bounds`), from constants and clamps. Abstract interpretation
over intervals (Cousot and Cousot, 1977), of the few operations that indices are made by; what is
made by others may be anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lint import Instruction

# Their numbers are those of their operands, in another order or form.
_KEEPING = frozenset(
    ("broadcast", "reshape", "transpose", "slice", "concatenate", "reverse", "copy")
)
_WIDEST = 2**31 - 1
_WHOLE = re.compile(r"(pred|[su]\d+)\[")


@dataclass(frozen=True)
class Interval:
    """Whole numbers from `low` to `high`, both included."""

    low: float = -inf
    high: float = inf

    def __or__(self, other: Interval) -> Interval:
        return Interval(min(self.low, other.low), max(self.high, other.high))

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __mul__(self, other: Interval) -> Interval:
        ends = [a * b if a and b else 0 for a in self.ends for b in other.ends]
        return Interval(min(ends), max(ends))

    @property
    def ends(self) -> tuple[float, float]:
        """Both."""
        return self.low, self.high

    def least(self, other: Interval) -> Interval:
        """Of the lesser of two numbers."""
        return Interval(min(self.low, other.low), min(self.high, other.high))

    def most(self, other: Interval) -> Interval:
        """Of the greater of two numbers."""
        return Interval(max(self.low, other.low), max(self.high, other.high))


ANY, BIT = Interval(), Interval(0, 1)


class Ranges:
    """The intervals of one module's instructions. `known` are those of parameters, by number."""

    def __init__(self, listed: Sequence[Instruction], known: Mapping[int, Interval]) -> None:
        self._listed = {i.name: i for i in listed}
        self._known = known
        self._found: dict[str, Interval] = {}

    def of(self, name: str) -> Interval:
        """The interval of an instruction's numbers."""
        if name not in self._found:
            # Deeper than Python's stack: the operands first, in the text's order, which is theirs.
            waiting = [name]
            while waiting:
                i = self._listed[waiting[-1]]
                left = [n for n in i.operands if n in self._listed and n not in self._found]
                if left and _WHOLE.match(i.shapes[0]):
                    waiting += left
                else:
                    self._found[i.name] = self._interval(i)
                    waiting.pop()
        return self._found[name]

    def _interval(self, i: Instruction) -> Interval:
        shape = i.shapes[0]
        if not _WHOLE.match(shape):
            return ANY
        operands = [self._found.get(name, ANY) for name in i.operands]
        found = self._made(i, operands)
        if any(abs(end) > _WIDEST and isfinite(end) for end in found.ends):
            found = ANY  # it may wrap around: the hardware has 32 bits
        return BIT if found == ANY and shape.startswith("pred") else found

    def _made(self, i: Instruction, given: Sequence[Interval]) -> Interval:
        match i.opcode, given:
            case "parameter", _:
                number = int(i.rest.partition(")")[0])
                return self._known.get(number, ANY) if i.entry else ANY
            case "constant", _:
                return _constant(i.rest)
            case "iota", _:
                dimension = int(i.rest.partition("iota_dimension=")[2].partition(",")[0] or 0)
                return Interval(0, sizes(i.shapes[0])[dimension] - 1)
            case "convert", [x]:
                return x if self._is_whole(i.operands[0]) else ANY
            case "gather", [x, *_]:
                return x
            case opcode, [x, *rest] if opcode in _KEEPING:
                for other in rest:
                    x |= other
                return x
            case "clamp", [low, x, high]:
                return x.most(low).least(high)
            case "minimum", [x, y]:
                return x.least(y)
            case "maximum", [x, y]:
                return x.most(y)
            case "add", [x, y]:
                return x + y
            case "subtract", [x, y]:
                return x + -y
            case "multiply", [x, y]:
                return x * y
            case "negate", [x]:
                return -x
            case "compare", [x, y] if "direction=LT" in i.rest:
                return Interval(int(x.high < y.low), int(x.low < y.high))
            case "select", [which, x, y]:
                return y if which.high == 0 else x if which.low == 1 else x | y
            case _:
                return ANY

    def _is_whole(self, name: str) -> bool:
        return name in self._listed and bool(_WHOLE.match(self._listed[name].shapes[0]))


def sizes(shape: str) -> list[int]:
    """The dimensions in a shape's text, as `f32[8,2]`."""
    inside = shape.partition("[")[2].rstrip("]")
    return [int(size) for size in inside.split(",") if size.isdigit()]


def _constant(rest: str) -> Interval:
    """Of a constant's text, in which large ones are left out."""
    text = rest.rpartition(")")[0].partition("), ")[0]
    words = {"false": 0, "true": 1}
    found = [words[w] if w in words else int(w) for w in re.findall(r"-?\d+|true|false", text)]
    return Interval(min(found), max(found)) if found and "..." not in text else ANY


@dataclass(frozen=True)
class Access:
    """A gather or scatter of an operand of these dimensions; a scatter's `updates` have those."""

    instruction: Instruction
    operand: Sequence[int]
    updates: Sequence[int]

    @property
    def chosen(self) -> list[int]:
        """The operand's dimensions that the indices are of."""
        return self._numbers("start_index_map") or self._numbers("scatter_dims_to_operand_dims")

    @property
    def window(self) -> list[int]:
        """How much is read or written at an index, in each of the operand's dimensions."""
        if self.instruction.opcode == "gather":
            return self._numbers("slice_sizes")
        left = iter([self.updates[n] for n in self._numbers("update_window_dims")])
        inserted = self._numbers("inserted_window_dims")
        return [1 if n in inserted else next(left) for n in range(len(self.operand))]

    @property
    def highest(self) -> int:
        """The largest index that is in range of all of them."""
        window = self.window
        return min(self.operand[n] - window[n] for n in self.chosen)

    def _numbers(self, name: str) -> list[int]:
        found = re.search(name + r"=\{([\d,]*)\}", self.instruction.rest)
        return [int(n) for n in found[1].split(",") if n] if found else []


def reaching(listed: Sequence[Instruction], known: Mapping[int, Interval]) -> Iterator[str]:
    """Every gather and scatter whose indices are not known to be in range, one line each."""
    ranges, shapes = Ranges(listed, known), {i.name: i.shapes[0] for i in listed if i.shapes}
    for i in listed:
        if i.opcode not in ("gather", "scatter"):
            continue
        operand, indices, *updates = i.operands
        written = sizes(shapes[updates[0]]) if updates else []
        access, found = Access(i, sizes(shapes[operand]), written), ranges.of(indices)
        if not 0 <= found.low <= found.high <= access.highest:
            yield (
                f"{i.name}: {i.opcode} at {found.low:g} to {found.high:g}, which must be 0 to "
                f"{access.highest} of {shapes[operand]}"
            )
