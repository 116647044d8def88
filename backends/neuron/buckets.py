"""Which static graphs there are: buckets of rows, queries and context, in powers of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from lmi_multi.backends.base import Limits
from lmi_multi.errors import OptionError
from lmi_multi.models.spec import ModelSpec

from .program import Trace
from .sampling import COLUMNS, MOST_VOCAB

VARIABLE = "LMI_MULTI_NEURON_BUCKETS"
LEAST_QUERIES = 16
LEAST_CONTEXT = 32
T = TypeVar("T")
SPAN = 16  # how many times the smallest bucket of tokens the largest is, unless others are named


class Kind(Enum):
    """What a decoder's graph gives, and how its tag ends: each row's likeliest token; for rows of
    one token a token drawn as the row's options say, or each row's likeliest continuations after
    blocks were copied; or the logits of all tokens."""

    GREEDY = ""
    SAMPLED = "_sampled"
    BEAMS = "_beams"
    ALL = "_all"


def ladder(least: int, most: int) -> list[int]:
    """least, 2 * least, ... and `most` itself at the end."""
    steps = []
    while least < most:
        steps.append(least)
        least *= 2
    return [*steps, most]


def fit(steps: Sequence[int], wanted: int) -> int:
    """The smallest step that holds `wanted`. Raises ValueError if none does."""
    for step in steps:
        if wanted <= step:
            return step
    raise ValueError(f"{wanted} exceeds the largest bucket, {steps[-1]}")


def fit_most(steps: Sequence[int], wanted: int) -> int:
    """The smallest step that holds `wanted`, or else the largest."""
    return fit(steps, min(wanted, steps[-1]))


def _upper(steps: Sequence[int]) -> list[int]:
    """Without the steps that are less than 1 / SPAN of the largest."""
    return [step for step in steps if step * SPAN >= steps[-1]]


def _ends(steps: Sequence[T]) -> list[T]:
    """The first step and the last."""
    return list(dict.fromkeys((steps[0], steps[-1])))


@dataclass(frozen=True)
class Buckets:
    """The ladders of one loaded model, out of those steps in `known` that it can have.

    `context` and `queries` are in tokens, contexts in whole blocks; `encoded`, of prompts, is
    empty without an encoder.
    """

    rows: Sequence[int]
    queries: Sequence[int]
    context: Sequence[int]
    encoded: Sequence[int]
    block_size: int
    spec: ModelSpec
    blocks: int
    known: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, spec: ModelSpec, limits: Limits, blocks: int) -> Buckets:
        """Powers of two up to what `limits` allow, over a pool of `blocks`."""
        size = limits.block_size
        longest = -(-limits.max_tokens // size) * size
        most = min(limits.max_step_tokens, longest)
        context = [-(-n // size) * size for n in ladder(min(LEAST_CONTEXT, longest), longest)]
        known = {
            "rows": ladder(1, limits.max_batch),
            "queries": ladder(min(LEAST_QUERIES, most), most),
            "context": context,
            "encoded": context if spec.encoder_layers else [],
        }
        queries = _upper(known["queries"])
        if spec.encoder_layers:  # its answers begin with one token, but for a text that is scored
            queries = _ends(queries)
        return cls(
            rows=known["rows"],
            queries=queries,
            context=_upper(context),
            encoded=_upper(known["encoded"]),
            block_size=size,
            spec=spec,
            blocks=blocks,
            known=known,
        )

    @property
    def ladders(self) -> dict[str, list[int]]:
        """The sizes by what they are sizes of; those that the network has no use for are left
        out."""
        encoder = {"encoded": list(self.encoded)} if self.spec.encoder_layers else {}
        if not self.spec.decoder_layers:
            return encoder
        decoder = {"rows": self.rows, "queries": self.queries, "context": self.context}
        return {name: list(steps) for name, steps in decoder.items()} | encoder

    def having(self, wanted: str) -> Buckets:
        """With the steps that `wanted` names, as "rows=1,4 context=512", and no others; a ladder
        that it does not name stays as it is. The largest step of each must stay. Raises
        OptionError."""
        chosen: dict[str, Any] = {}
        for part in wanted.split():
            name, _, listed = part.partition("=")
            if name not in self.ladders:
                raise OptionError(
                    f"{VARIABLE} names {name!r}, must be of {', '.join(self.ladders)}"
                )
            known, named = {str(step): step for step in self.known[name]}, set(listed.split(","))
            last = list(known)[-1]
            if last not in named or not named <= known.keys():
                raise OptionError(
                    f"{VARIABLE} has {part!r}, must be {last} and any of {', '.join(known)}"
                )
            chosen[name] = [step for text, step in known.items() if text in named]
        return replace(self, **chosen)

    def traces(self) -> Iterator[Trace]:
        """Every graph that these ladders make."""
        for tokens in self.encoded:
            yield self.encode(tokens)
        if not self.spec.decoder_layers:
            return
        for size in self.sizes(1):
            for kind in (Kind.GREEDY, Kind.SAMPLED, Kind.BEAMS):
                for rows in self.rows_of(kind):
                    yield self.decode(rows, 1, *size, kind)
        for kind in (Kind.GREEDY, Kind.ALL):
            for queries in self.queries_of(kind):
                for size in self.sizes(queries):
                    yield self.decode(1, queries, *size, kind)

    def sizes(self, queries: int) -> list[tuple[int, int]]:
        """Contexts of graphs for so many `queries`, each with a length of encoded prompts (0
        without an encoder): from one to the next neither shrinks, and the last holds everything.

        The two grow together: each with each would be many graphs for a few reads of a cache that
        is small beside the weights. Slices of a prompt but its last are of the most queries, and
        mostly the last one is all of a prompt, so that others need the smallest context, and the
        largest for what is left.
        """
        encoded = self.encoded or (0,)
        steps = sorted({*self.context, *encoded})
        pairs = [(fit_most(self.context, n), fit_most(encoded, n)) for n in steps]
        holding = list(dict.fromkeys(pair for pair in pairs if queries <= pair[0]))
        return holding if queries in (1, self.queries[-1]) else _ends(holding)

    def size(self, queries: int, context: int, encoded: int) -> tuple[int, int]:
        """The first of `sizes` that holds both. Raises ValueError if none does."""
        for size in self.sizes(queries):
            if context <= size[0] and encoded <= size[1]:
                return size
        raise ValueError(f"{context} tokens over {encoded} exceed the largest buckets")

    def rows_of(self, kind: Kind) -> Sequence[int]:
        """The rows of this kind's graphs for single tokens, which may be none: too large a
        vocabulary is not drawn from, and one beam never parts from another."""
        if kind == Kind.SAMPLED and self.spec.vocab > MOST_VOCAB:
            return ()
        return [rows for rows in self.rows if rows > 1] if kind == Kind.BEAMS else self.rows

    def queries_of(self, kind: Kind) -> Sequence[int]:
        """The queries of this kind's graphs for longer rows: texts that are scored or embedded are
        padded more, which is rarer than to go on from a prompt."""
        return _ends(self.queries) if kind == Kind.ALL else self.queries

    def encode(self, tokens: int) -> Trace:
        """One prompt of up to `tokens` tokens."""
        inputs = {"token_ids": (tokens,), "positions": (tokens,), "lengths": (1,)}
        if self.spec.segments:
            inputs["segments"] = (tokens,)
        if self.spec.decoder_layers:
            inputs["slots"] = (tokens,)
        return self._trace(f"encode_{tokens}", inputs)

    def decode(self, rows: int, queries: int, context: int, encoded: int, kind: Kind) -> Trace:
        """`rows` rows of `queries` tokens each over contexts of up to `context` tokens."""
        tokens = rows * queries
        inputs: dict[str, tuple[int, ...]] = {
            "token_ids": (tokens,),
            "positions": (tokens,),
            "slots": (tokens,),
            "table": (rows, context // self.block_size),
        }
        if kind != Kind.ALL:
            inputs["last"] = (rows,)
        if kind == Kind.BEAMS:
            inputs |= {"sources": (rows,), "targets": (rows,)}
        if kind == Kind.SAMPLED:
            inputs |= {"temperature": (rows,), "how": (rows, COLUMNS)}
        if encoded:
            inputs["cross_table"] = (rows, encoded // self.block_size)
            inputs["cross_lengths"] = (rows,)
        tag = f"decode_{rows}x{queries}_of_{context}" + (f"_with_{encoded}" if encoded else "")
        return self._trace(tag + kind.value, inputs)

    def _trace(self, tag: str, inputs: Mapping[str, tuple[int, ...]]) -> Trace:
        blocks, spec = self.blocks, self.spec
        bounds = {"token_ids": spec.vocab, "slots": blocks * self.block_size}
        bounds |= dict.fromkeys(("table", "cross_table", "sources", "targets"), blocks)
        bounds["last"] = inputs["token_ids"][0]
        if spec.segments:
            bounds["segments"] = spec.segments
        if spec.max_positions:
            bounds["positions"] = spec.max_positions
        return Trace(tag, inputs, bounds, frozenset({"temperature"}) & inputs.keys())
