"""Steps of the engine as runs of static graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.backends.drawing import draw_by_row
from lmi_multi.engine.batch import Batch, Continuations, Draw, Passage, Prompt, Row, StepResult
from lmi_multi.models.spec import ModelSpec
from lmi_multi.ops.sampling import SampleRow

from .buckets import Buckets, Kind, fit
from .inputs import block_table, padded, slots
from .lint import check_inputs
from .program import Program, Trace
from .sampling import can_draw, options
from .search import can_rank, ranked
from .sizing import spare_blocks


class NeuronExecutor:
    """An `Executor` over a `Program`.

    The engine's paged blocks are the graph's: a block table comes with every step. Rows of one
    token run together in a bucket of rows, beams apart from others, and longer ones each in a
    bucket of queries. Fresh blocks need no clearing: see `attention`. The pool has
    `spare_blocks` more than the engine knows of: scoring and embedding, which have no blocks, use
    them, and the last one takes what padding writes.
    """

    def __init__(
        self, spec: ModelSpec, limits: Limits, program: Program, buckets: Buckets, device: str
    ) -> None:
        self.limits, self.device = limits, device
        self._spec, self._program, self._buckets = spec, program, buckets
        self._size = limits.block_size
        self._trash = limits.blocks + spare_blocks(spec, limits) - 1
        spare = range(limits.blocks, self._trash)
        own = -(-limits.max_tokens // self._size)
        self._own, self._cross = spare[:own], spare[own:]

    def step(self, batch: Batch) -> StepResult:
        """See `Executor.step`. What graphs cannot draw is drawn here, from the logits."""
        self._encode_all(batch.prompts)
        found: dict[int, Draw | Continuations] = {}
        for kind, numbers in self._groups(batch.rows):
            answers = self._answer([batch.rows[i] for i in numbers], kind)
            found |= {numbers[place]: answer for place, answer in answers.items()}
        return StepResult([found[i] for i in sorted(found)])

    def logits(self, batch: Batch) -> Tensor:
        """See `Executor.logits`."""
        if not batch.rows:
            raise ValueError("the batch has no rows")
        if any(row.copies for row in batch.rows):
            raise ValueError("blocks are copied by steps, not where only logits are wanted")
        self._encode_all(batch.prompts)
        found: dict[int, Tensor] = {}
        # Row by row, the longer ones first: others may read what they write.
        for i in sorted(range(len(batch.rows)), key=lambda i: len(batch.rows[i].token_ids) == 1):
            found[i] = self._whole(batch.rows[i])[1]
        return torch.cat([found[i] for i in range(len(batch.rows))])

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """See `Executor.encode`."""
        parts, pooled = [], []
        for prompt in prompts:
            if not self._spec.encoder_layers:
                parts.append(self._whole(self._spare_row(prompt.token_ids))[0])
                continue
            hidden, *rest = self._encode(prompt, self._cross)
            parts.append(hidden[: len(prompt.token_ids)])
            pooled += rest
        return torch.cat(parts), torch.cat(pooled) if pooled else None

    def score(self, passages: Sequence[Passage]) -> Tensor:
        """See `Executor.score`."""
        parts = []
        for passage in passages:
            if passage.encoder_ids is not None:
                self._encode(Prompt(passage.encoder_ids), self._cross)
            row = self._spare_row(passage.token_ids, len(passage.encoder_ids or ()))
            scores = self._whole(row)[1].log_softmax(-1)
            targets = torch.tensor(passage.token_ids[1:], dtype=torch.int64)
            parts.append(scores[:-1].gather(-1, targets[:, None])[:, 0])
        return torch.cat(parts)

    def close(self) -> None:
        """See `Executor.close`."""
        self._program.close()

    def _run(self, trace: Trace, inputs: dict[str, Tensor]) -> list[Tensor]:
        check_inputs(trace.tag, trace.bounds, inputs)
        return self._program.run(trace.tag, **inputs)

    def _encode_all(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._encode(prompt, prompt.cross_blocks)

    def _groups(self, rows: Sequence[Row]) -> Iterator[tuple[Kind, list[int]]]:
        """Numbers of rows that run in one graph: long rows first, as others may read what they
        write; the other way round nothing can be, a single token's row reads only its own."""
        beams: list[int] = []
        others: list[int] = []
        for numbers in _shares(rows):
            first = rows[numbers[0]]
            if len(first.token_ids) > 1:
                yield Kind.GREEDY, list(numbers)
            elif first.beams is not None:
                beams += numbers
            else:
                others += numbers
        if beams:
            yield Kind.BEAMS, beams
        if others:
            yield self._kind([rows[i] for i in others]), others

    def _kind(self, rows: Sequence[Row]) -> Kind:
        """Of the graph for rows of one token of which none is a beam."""
        samples = any(_drawn(r, Kind.SAMPLED) and not _drawn(r, Kind.GREEDY) for r in rows)
        return Kind.SAMPLED if samples and self._buckets.rows_of(Kind.SAMPLED) else Kind.GREEDY

    def _answer(self, rows: Sequence[Row], kind: Kind) -> dict[int, Draw | Continuations]:
        """What the rows of one graph get, by their places: from the graph, or from its logits."""
        tokens, best, logits, *found = self._run_rows(rows, kind)
        answers: dict[int, Draw | Continuations] = {}
        left: list[int] = []
        for places in _shares(rows):
            first, own = places[0], slice(places.start, places.stop)
            if found and can_rank(rows[own], found[0].shape[-1]):
                answers[first] = ranked(rows[own], best[own], found[0][own], found[1][own])
            elif rows[first].beams is None and _drawn(rows[first], kind):
                answers[first] = _draw(tokens[first], best[first])
            elif rows[first].sample is not None:
                left += places
        if left:
            by_host = draw_by_row(logits[left], [rows[i] for i in left])
            answers |= {left[place]: answer for place, answer in by_host.items()}
        return answers

    def _run_rows(self, rows: Sequence[Row], kind: Kind) -> list[Tensor]:
        """Run rows that have one token each, or one row that has several."""
        queries, count = max(len(row.token_ids) for row in rows), 1
        if queries > 1 or kind == Kind.ALL:
            queries = fit(self._buckets.queries_of(kind), queries)
        else:
            count = fit(self._buckets.rows_of(kind), len(rows))
        context = max(max(row.length for row in rows), queries)
        encoded = max(row.cross_length for row in rows)
        size = self._buckets.size(queries, context, encoded)
        trace = self._buckets.decode(count, queries, *size, kind)
        return self._run(trace, self._inputs(trace, rows))

    def _inputs(self, trace: Trace, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What `trace` wants of `rows`."""
        shapes, size, trash = trace.inputs, self._size, self._trash
        count, width = shapes["table"]
        tokens = shapes["token_ids"][0]
        at = [p for row in rows for p in range(row.start, row.length)]
        inputs = {
            "token_ids": padded([t for row in rows for t in row.token_ids], tokens, 0),
            "positions": padded(at, tokens, 0),
            "slots": padded(
                [s for r in rows for s in slots(r.blocks, r.start, r.length, size)],
                tokens,
                trash * size,
            ),
            "table": block_table([row.blocks for row in rows], count, width, trash),
        }
        if "last" in shapes:
            several = len(rows) == 1
            last = [len(rows[0].token_ids) - 1] if several else range(len(rows))
            inputs["last"] = padded(last, count, 0)
        if "sources" in shapes:
            copies = [pair for row in rows for pair in row.copies]
            inputs["sources"] = padded([source for source, _ in copies], count, trash)
            inputs["targets"] = padded([target for _, target in copies], count, trash)
        if "how" in shapes:
            given = [row.sample if _drawn(row, Kind.SAMPLED) else None for row in rows]
            samples = [sample or SampleRow() for sample in given]
            inputs["temperature"], inputs["how"] = options(samples, count)
        if "cross_table" in shapes:
            width = shapes["cross_table"][1]
            cross = [row.cross_blocks for row in rows]
            inputs["cross_table"] = block_table(cross, count, width, trash)
            # A row of padding has one token of the spare block, so that its softmax has a key.
            inputs["cross_lengths"] = padded([row.cross_length for row in rows], count, 1)
        return inputs

    def _encode(self, prompt: Prompt, blocks: Sequence[int]) -> list[Tensor]:
        count = len(prompt.token_ids)
        bucket = fit(self._buckets.encoded, count)
        trace = self._buckets.encode(bucket)
        inputs = {
            "token_ids": padded(prompt.token_ids, bucket, 0),
            "positions": padded(range(count), bucket, 0),
            "lengths": torch.tensor([count]),
        }
        if "segments" in trace.inputs:
            inputs["segments"] = padded(prompt.segment_ids or (), bucket, 0)
        if "slots" in trace.inputs:
            own = slots(blocks, 0, count, self._size)
            inputs["slots"] = padded(own, bucket, self._trash * self._size)
        return self._run(trace, inputs)

    def _whole(self, row: Row) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of all tokens of a row, in slices that the buckets hold."""
        longest, hidden, logits = self._buckets.queries[-1], [], []
        for start in range(0, len(row.token_ids), longest):
            own = row.token_ids[start : start + longest]
            part = Row(own, row.start + start, row.blocks, 0, row.cross_blocks, row.cross_length)
            states, scores = self._run_rows([part], Kind.ALL)
            hidden.append(states[: len(own)])
            logits.append(scores[: len(own)])
        return torch.cat(hidden), torch.cat(logits)

    def _spare_row(self, token_ids: Sequence[int], encoded: int = 0) -> Row:
        cross = self._cross if encoded else ()
        return Row(token_ids, 0, self._own, len(token_ids), cross, encoded)


def _shares(rows: Sequence[Row]) -> Iterator[range]:
    """The numbers of each row, or of all the rows of a search: its first one tells how many."""
    start = 0
    while start < len(rows):
        beams = rows[start].beams
        stop = start + (1 if beams is None else len(beams.scores))
        yield range(start, stop)
        start = stop


def _drawn(row: Row, kind: Kind) -> bool:
    """Whether a graph of this kind draws the row's token, if it is no beam's."""
    sample = row.sample
    if sample is None or not can_draw(sample):
        return False
    return kind == Kind.SAMPLED or not sample.temperature


def _draw(token: Tensor, best: Tensor) -> Draw:
    finite = bool(torch.isfinite(best))
    return Draw(int(token) if finite else 0, finite)
