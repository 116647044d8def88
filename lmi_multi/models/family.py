"""A family: which architectures it covers, the spec they describe, and where weights come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lmi_multi.models.config import Config
from lmi_multi.models.spec import ModelSpec

Fix = Callable[[Tensor, ModelSpec], Tensor]


@dataclass(frozen=True)
class Weight:
    """One canonical module: its source modules, concatenated along dim 0, then passed to `fix`.

    A source is a module path; its `.weight` must exist unless `optional`, its `.bias` may. `fix`
    gets the weight or the bias and the spec; it must also work on meta tensors, because shapes
    are checked before any data is read. An optional module is absent as a whole, or present as
    a whole.
    """

    sources: tuple[str, ...]
    fix: Fix | None = None
    optional: bool = False


def weight(*sources: str, fix: Fix | None = None, optional: bool = False) -> Weight:
    """Short form of `Weight`."""
    return Weight(sources, fix, optional)


def layers(stack: str, count: int, prefix: str, table: Mapping[str, Weight]) -> dict[str, Weight]:
    """Expand a layer's table: `{i}` in `prefix` is the layer's number; canonical `stack.i.name`."""
    return {
        f"{stack}.{i}.{name}": Weight(
            tuple(prefix.format(i=i) + source for source in entry.sources),
            entry.fix,
            entry.optional,
        )
        for i in range(count)
        for name, entry in table.items()
    }


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint layout as data.

    `base` is the prefix that checkpoints saved from a bare base model lack: tables are written
    without it. `ignored` are regular expressions (full match, base prefix removed) for source
    tensors that carry nothing the network needs. `renames` maps old name endings to today's.
    `aliases` lists, for a module, other names under which the same tensor may have been saved:
    the first that is there stands in when the module itself is missing.
    """

    name: str
    architectures: tuple[str, ...]
    spec: Callable[[Config], ModelSpec]
    weights: Callable[[ModelSpec], dict[str, Weight]]
    base: str = ""
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
