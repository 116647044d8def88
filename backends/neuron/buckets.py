"""Which static graphs there are: buckets of rows, queries and context, in powers of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from lmi_multi.backends.base import Limits
from lmi_multi.errors import OptionError
from lmi_multi.models.spec import ModelSpec

from .program import Trace
from .sampling import COLUMNS, MOST_VOCAB

VARIABLE = "LMI_MULTI_NEURON_BUCKETS"
LEAST_QUERIES = 16
LEAST_CONTEXT = 32


class Kind(Enum):
    """What a decoder's graph gives, and how its tag ends: each row's likeliest token, a token drawn
    as the row's options say, each row's likeliest continuations after blocks were copied, or the
    logits of all tokens."""

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


@dataclass(frozen=True)
class Buckets:
    """The ladders of one loaded model. `context` and `queries` are in tokens, contexts in whole
    blocks; `encoded`, of prompts, is empty without an encoder."""

    rows: Sequence[int]
    queries: Sequence[int]
    context: Sequence[int]
    encoded: Sequence[int]
    block_size: int
    spec: ModelSpec
    blocks: int

    @classmethod
    def of(cls, spec: ModelSpec, limits: Limits, blocks: int) -> Buckets:
        """Powers of two up to what `limits` allow, over a pool of `blocks`."""
        size = limits.block_size
        longest = -(-limits.max_tokens // size) * size
        context = [-(-n // size) * size for n in ladder(min(LEAST_CONTEXT, longest), longest)]
        queries = min(limits.max_step_tokens, longest)
        return cls(
            rows=ladder(1, limits.max_batch),
            queries=ladder(min(LEAST_QUERIES, queries), queries),
            context=context,
            encoded=context if spec.encoder_layers else (),
            block_size=size,
            spec=spec,
            blocks=blocks,
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

    def pruned(self, kept: str) -> Buckets:
        """With only the steps that `kept` names, as "rows=1,4 context=512"; a ladder that it does
        not name stays whole. The largest step of each must stay. Raises OptionError."""
        ladders = self.ladders
        chosen: dict[str, Any] = {}
        for part in kept.split():
            name, _, listed = part.partition("=")
            if name not in ladders:
                raise OptionError(f"{VARIABLE} names {name!r}, must be of {', '.join(ladders)}")
            known, wanted = {str(step): step for step in ladders[name]}, set(listed.split(","))
            last = list(known)[-1]
            if last not in wanted or not wanted <= known.keys():
                raise OptionError(
                    f"{VARIABLE} has {part!r}, must be {last} and any of {', '.join(known)}"
                )
            chosen[name] = [step for text, step in known.items() if text in wanted]
        return replace(self, **chosen)

    def traces(self) -> Iterator[Trace]:
        """Every graph that these ladders make."""
        for tokens in self.encoded:
            yield self.encode(tokens)
        if not self.spec.decoder_layers:
            return
        for context in self.context:
            for encoded in self.encoded or (0,):
                for kind in (Kind.GREEDY, Kind.SAMPLED, Kind.BEAMS):
                    for rows in self.rows_of(kind):
                        yield self.decode(rows, 1, context, encoded, kind)
                for queries in self.queries:
                    for kind in (Kind.GREEDY, Kind.SAMPLED, Kind.ALL):
                        if queries <= context and self.rows_of(kind):
                            yield self.decode(1, queries, context, encoded, kind)

    def rows_of(self, kind: Kind) -> Sequence[int]:
        """The rows of this kind's graphs for single tokens, which may be none: too large a
        vocabulary is not drawn from, and one beam never parts from another."""
        if kind == Kind.SAMPLED and self.spec.vocab > MOST_VOCAB:
            return ()
        return [rows for rows in self.rows if rows > 1] if kind == Kind.BEAMS else self.rows

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
        if spec.segments:
            bounds["segments"] = spec.segments
        if spec.max_positions:
            bounds["positions"] = spec.max_positions
        return Trace(tag, inputs, bounds, frozenset({"temperature"}) & inputs.keys())
