"""Pipeline stages: which layers, and which tensors beside them, each part of a network holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmi_multi.errors import OptionError
from lmi_multi.models.spec import ModelSpec

STACKS = ("encoder", "decoder")
_AT_THE_END = ("head", "project_out", "pooler")


@dataclass(frozen=True)
class Stage:
    """Part `index` of `count`: consecutive layers of the encoder and of the decoder, at least one
    of each stack that the network has. The first stage embeds; the last has the final norms and
    the head, and draws."""

    index: int
    count: int
    encoder: range
    decoder: range

    @property
    def first(self) -> bool:
        """Whether it embeds."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it draws."""
        return self.index == self.count - 1

    def tensors(self, names: Iterable[str]) -> set[str]:
        """Those of all canonical tensors `names` that this stage holds.

        A tied embedding is on the first and on the last stage. A bias table that all layers of a
        stack share, which is named after its first layer, is on every stage.
        """
        every = set(names)
        tied = "head.weight" not in every
        return {name for name in every if self._holds(name, every, tied)}

    def _holds(self, name: str, every: set[str], tied: bool) -> bool:
        stack, layer, module = _place(name)
        if layer is None:
            return _beside(module, self.first, self.last, tied)
        if module == "relative" and f"{stack}.1.relative.weight" not in every:
            return True
        return layer in (self.encoder if stack == "encoder" else self.decoder)


def _place(name: str) -> tuple[str, int | None, str]:
    """(stack, layer, module) of a canonical tensor; no layer for what is beside the layers."""
    module, _, _ = name.rpartition(".")
    stack, _, rest = module.partition(".")
    layer, _, inner = rest.partition(".")
    return (stack, int(layer), inner) if layer.isdigit() else ("", None, module)


def _beside(module: str, first: bool, last: bool, tied: bool) -> bool:
    """Whether a stage holds a module that belongs to no layer."""
    if module == "embed":
        return first or (last and tied)
    if module in _AT_THE_END or module in [f"{stack}.norm" for stack in STACKS]:
        return last
    return first


def most_stages(spec: ModelSpec) -> int:
    """How many stages can have a layer of every stack."""
    return min(n for n in _layers(spec) if n)


def check_stages(spec: ModelSpec, count: int) -> None:
    """Raise OptionError unless each of `count` stages can have a layer of every stack."""
    layers = {s: n for s, n in zip(STACKS, _layers(spec), strict=True) if n}
    stack = min(layers, key=lambda s: layers[s])
    most = layers[stack]
    if type(count) is not int or not 1 <= count <= most:
        plural = "" if most == 1 else "s"
        raise OptionError(
            f"pipeline_parallel is {count!r:.80}, but the {stack} has {most} layer{plural}; "
            f"allowed: an integer from 1 to {most}"
        )


def plan_stages(spec: ModelSpec, sizes: Mapping[str, int], count: int) -> list[Stage]:
    """Cut the network into `count` stages such that the largest holds as few bytes as it can.

    `sizes` are the bytes of every canonical tensor. The encoder is cut first, then the decoder so
    that it evens out the rest. Raises OptionError as `check_stages` does.
    """
    check_stages(spec, count)
    layers = {s: [0] * n for s, n in zip(STACKS, _layers(spec), strict=True)}
    held = [0] * count
    tied = "head.weight" not in sizes
    for name, size in sizes.items():
        stack, layer, module = _place(name)
        if layer is not None:
            layers[stack][layer] += size
            continue
        for i in range(count):
            held[i] += size * _beside(module, i == 0, i == count - 1, tied)
    cuts = []
    for stack in STACKS:
        cuts.append(_balanced(layers[stack], held))
        held = [
            own + sum(layers[stack][i] for i in cut)
            for own, cut in zip(held, cuts[-1], strict=True)
        ]
    return [
        Stage(i, count, encoder, decoder)
        for i, (encoder, decoder) in enumerate(zip(*cuts, strict=True))
    ]


def _layers(spec: ModelSpec) -> tuple[int, int]:
    return spec.encoder_layers, spec.decoder_layers


def _balanced(sizes: list[int], held: list[int]) -> list[range]:
    """Consecutive layers for every stage, none without, that keep the largest sum of what a stage
    has already `held` and its layers' `sizes` as small as it can be."""
    if not sizes:
        return [range(0)] * len(held)
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    # best[n]: the largest sum when the stages so far share the first n layers, and their cuts.
    best: dict[int, tuple[int, list[range]]] = {0: (0, [])}
    for i, own in enumerate(held):
        stops = range(i + 1, len(sizes) - (len(held) - 1 - i) + 1)
        best = {stop: _longer(best, own, ends, stop) for stop in stops}
    return best[len(sizes)][1]


def _longer(
    best: dict[int, tuple[int, list[range]]], own: int, ends: list[int], stop: int
) -> tuple[int, list[range]]:
    """The best way to go on from one of `best` with a stage that ends at layer `stop`."""
    ways = [
        (max(largest, own + ends[stop] - ends[start]), start)
        for start, (largest, _) in best.items()
        if start < stop
    ]
    largest, start = min(ways)
    return largest, [*best[start][1], range(start, stop)]
