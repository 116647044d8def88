"""What stands in for a GPU: kernels in plain torch, graphs that do their work anew, no streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lmi_multi.backends.cuda import (
    ahead,
    attention,
    beams,
    capturing,
    draws,
    executor,
    fused_draws,
    graphs,
    inputs,
    prefill_inputs,
    searches,
)
from lmi_multi.backends.cuda.ops import ACTIVATIONS
from torch import Tensor

from lmi_multi.models.weights import Linear, Norm
from lmi_multi.ops.reference import Reference
from lmi_multi.ops.rules import History, Rules
from lmi_multi.ops.sampling import SampleRow, Sampling, sample
from tests import beams_kernel, prefill_kernel


def attend(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, write: bool, heads: int,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor | None,
    sin: Tensor | None, bias: Tensor | None, slopes: Tensor | None, window: int, scale: float,
    splits: int, work: Tensor, counters: Tensor, out: Tensor,
) -> bool:  # fmt: skip
    """The attention kernel, a row at a time."""
    from lmi_multi.models.rope import rotate

    size, kv, dim = k.shape[1:]
    assert q_norm is None and k_norm is None
    for row, length in enumerate(lengths.tolist()):
        own = q[row].view(1, -1, dim)
        query = own[:, :heads]
        if cos is not None and sin is not None:
            query = rotate(query, cos[row : row + 1], sin[row : row + 1])
        if write:
            new = own[:, heads : heads + kv]
            if cos is not None and sin is not None:
                new = rotate(new, cos[row : row + 1], sin[row : row + 1])
            block, place = table[row, (length - 1) // size], (length - 1) % size
            k[block, place], v[block, place] = new[0], own[0, heads + kv :]
        blocks = table[row, : -(-length // size)].long()
        keys, values = (
            c[blocks].flatten(0, 1)[:length].repeat_interleave(heads // kv, 1) for c in (k, v)
        )
        scores = torch.einsum("hd,thd->ht", query[0], keys) * scale
        distance = length - 1 - torch.arange(length)
        if bias is not None:
            scores = scores + bias[distance.clamp(max=len(bias) - 1)].t()
        if slopes is not None:
            scores = scores - slopes[:, None] * distance
        if window:
            scores = scores.masked_fill(distance >= window, -torch.inf)
        found = torch.einsum("ht,thd->hd", scores.softmax(-1), values) if length else 0 * query[0]
        out[row] = found.flatten()
    return True


def greedy(
    logits: Tensor, drawn: Tensor, ids: Tensor, lengths: Tensor, live: Tensor, turns: Tensor,
    work: Tensor, counters: Tensor,
) -> bool:  # fmt: skip
    """The kernel's, which refuses what it does not cover."""
    if logits.stride(1) != 1:
        return False
    best, tokens = logits.float().max(-1)
    usable = torch.isfinite(best)
    drawn[turns.long(), torch.arange(len(ids))] = torch.where(usable, tokens, -1)
    ids.copy_(torch.where(usable, tokens, 0))
    lengths.add_(live)
    turns.add_(live).remainder_(2)
    return True


def draw(
    logits: Tensor, options: Tensor, uniform: Tensor, lists: Tensor, history: Tensor,
    table: Tensor, cross_table: Tensor, cross_lengths: Tensor, drawn: Tensor, logprobs: Tensor,
    ids: Tensor, lengths: Tensor, live: Tensor, turns: Tensor, teams: Tensor,
) -> bool:  # fmt: skip
    """The kernel's, by what it is compared with, from what it is given on the device."""
    assert teams.numel() == fused_draws.TEAMS * fused_draws.TEAM_BYTES
    size, count = history.shape[1], len(logits)
    places = (lengths - 1).long()
    blocks = table.gather(1, (places // size)[:, None].to(torch.int64))[:, 0].long()
    history[blocks, places % size] = ids.int()
    rows = []
    for row, record in enumerate(options.numpy().view(fused_draws.OPTIONS)[:, 0]):
        tokens = history[table[row].long()].flatten()[: int(lengths[row])].tolist()
        encoded = history[cross_table[row].long()].flatten()[: int(cross_lengths[row])].tolist()
        rows.append(_row_of(record, lists.tolist(), tokens, encoded))
    sampling = replace(Sampling.of(rows), uniform=uniform)
    if not sampling.any_sampled:
        sampling = Sampling.of(rows)
    found = sample(logits.float(), sampling)
    drawn[turns.long(), torch.arange(count)] = torch.where(found.finite, found.tokens, -1)
    if found.logprobs is not None:
        told = [row for row in range(count) if rows[row].logprobs is not None]
        for row, chosen, own, top in zip(told, *found.logprobs, strict=True):
            record, width = logprobs[turns[row], row], len(own)
            record[0] = chosen.view(torch.int32)
            record[1 : 1 + fused_draws.MOST_LOGPROBS] = -1
            record[1 : 1 + width] = own
            first = 1 + fused_draws.MOST_LOGPROBS
            record[first : first + width] = top.view(torch.int32)
    ids.copy_(found.tokens)
    lengths.add_(live)
    turns.add_(live).remainder_(2)
    return True


def _row_of(record: Any, lists: list[int], tokens: list[int], encoded: list[int]) -> SampleRow:
    """A record of the kernel's options, read back."""

    def listed(name: str, count: str, each: int = 1) -> list[int]:
        first = int(record[name])
        return lists[first : first + int(record[count]) * each]

    pairs = np.array(listed("bias", "biases", 2), dtype=np.int32).reshape(-1, 2)
    bias = zip(pairs[:, 0].tolist(), pairs[:, 1].copy().view(np.float32).tolist(), strict=True)
    begin, count = int(record["words"]), int(record["word_count"])
    ends = lists[begin : begin + count + 1]
    words = lists[begin + count + 1 :]
    rules = Rules(
        bias=tuple(bias),
        encoder_repetition_penalty=1 / float(record["prompt"]),
        repetition_penalty=float(record["repetition"]),
        presence_penalty=float(record["presence"]),
        frequency_penalty=float(record["frequency"]),
        no_repeat_ngram_size=int(record["ngram"]),
        bad_words=tuple(tuple(words[a:b]) for a, b in pairwise(ends)) if count else (),
    )
    # Places that no row has keep options of those that had them.
    given = min(int(record["given"]), len(tokens))
    forced = tuple(listed("forced", "forces"))
    return SampleRow(
        temperature=float(record["temperature"]),
        top_k=int(record["top_k"]),
        top_p=float(record["top_p"]),
        min_p=float(record["min_p"]),
        typical_p=float(record["typical_p"]),
        step=len(tokens) - given,
        banned=tuple(listed("banned", "bans")),
        rules=None if rules == Rules() or forced else rules,
        forced=forced,
        logprobs=None if record["logprobs"] < 0 else int(record["logprobs"]),
        history=History(tokens, given, encoded),
    )


def greedy_of_ranks(
    logits: Tensor, first: int, inboxes: Tensor, rank: int, patience: int, failed: Tensor,
    *left: Tensor,
) -> bool:  # fmt: skip
    """`greedy` of all ranks' parts, which torch.distributed gathers."""
    assert inboxes[rank] == 100 + rank
    parts: list[Any] = [None] * len(inboxes)
    dist.all_gather_object(parts, logits)
    assert first == sum(part.shape[1] for part in parts[:rank])
    return greedy(torch.cat(parts, dim=1), *left)


def embed(
    ids: Tensor, lengths: Tensor, tokens: Tensor, first: int, positions: Tensor | None,
    cos_table: Tensor | None, sin_table: Tensor | None, x: Tensor, cos: Tensor | None,
    sin: Tensor | None,
) -> bool:  # fmt: skip
    local, places = ids - first, (lengths - 1).long()
    mine = (local >= 0) & (local < len(tokens))
    found = tokens[local.clamp(0, len(tokens) - 1)]
    if positions is not None:
        found = found + positions[places]
    x.copy_(torch.where(mine[:, None], found, 0))
    for table, to in ((cos_table, cos), (sin_table, sin)):
        assert (table is None) == (to is None)
        if table is not None and to is not None:
            to.copy_(table[places])
    return True


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    out.copy_(Reference().norm(x, Norm(weight, bias), eps))


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    residual: Tensor | None, activation: int, gated: bool, work: Tensor, counters: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    ops, kind = Reference(), next(k for k, number in ACTIVATIONS.items() if number == activation)
    if norm_weight is not None:
        x = ops.norm(x, Norm(norm_weight, norm_bias), eps)
    y = ops.linear(x, Linear(weight, bias, scale), kind, gated)
    out.copy_(y if residual is None else residual + y)


def recorded_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, norm_terms: Tensor | None, eps: float,
    *others: Any,
) -> None:  # fmt: skip
    """A product of a step: as `linear`, or with a LayerNorm behind it."""
    if norm_terms is None:
        linear(x, weight, scale, bias, norm_weight, norm_bias, eps, *others)
        return
    assert norm_weight is not None and norm_bias is None and bias is None
    residual, activation, gated, _, _, out = others
    mean = x.mean(-1, keepdim=True)
    factor = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps)
    y = factor * ((x * norm_weight) @ weight.to(x.dtype).T - mean * norm_terms[:, 0])
    y = (y + norm_terms[:, 1]) * (1 if scale is None else scale)
    kind = next(k for k, number in ACTIVATIONS.items() if number == activation)
    y = y if kind is None else Reference().activate(y, kind, gated)
    out.copy_(y if residual is None else residual + y)


def heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, norm_eps: float, *attention: Any,
) -> bool:  # fmt: skip
    """The kernel's, which covers few rows: a product, and attention with it."""
    if len(x) > 4:
        return False
    qkv = x.new_empty(len(x), len(weight))
    scratch = attention[-3:-1]
    linear(
        *(x, weight, None, bias, norm_weight, norm_bias, norm_eps),
        *(None, ACTIVATIONS[None], False, *scratch, qkv),
    )
    return attend(qkv, *attention)


class Programs:
    """Recorded phases as calls; a program is their numbers, and running it makes them."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []
        self.runs = 0
        self._exchanging = False

    def recording(self, call: Callable[..., object]) -> Callable[..., bool]:
        def record(*arguments: Any) -> bool:
            *given, barrier, phase = arguments
            assert isinstance(barrier, bool)
            phase[:8] = torch.tensor([len(self.calls)]).view(torch.uint8)
            self.calls.append(partial(call, *given))
            return True

        return record

    def add_up(
        self, product: Tensor, x: Tensor, residual: Tensor, bias: Tensor | None, out: Tensor
    ) -> None:
        """The sum over ranks, of which there are several processes."""
        total = x.float()
        if self._exchanging:
            dist.all_reduce(total)
        out.copy_(residual + (total if bias is None else total + bias))

    def run_of_ranks(
        self, program: Tensor, on_device: Tensor, barrier: Tensor, inboxes: Tensor, rank: int,
        patience: int, failed: Tensor,
    ) -> None:  # fmt: skip
        assert inboxes[rank] == 100 + rank
        self._exchanging = True
        try:
            self.run(program, on_device, barrier)
        finally:
            self._exchanging = False

    def run(self, program: Tensor, on_device: Tensor, barrier: Tensor) -> None:
        assert torch.equal(program, on_device)
        self.runs += 1
        for phase in program[1:]:
            self.calls[int(phase[:8].view(torch.int64))]()


class Replayed:
    """A graph that does its work anew; `out` is where the first run left it."""

    graph = None

    def __init__(self, body: Callable[[], Tensor]) -> None:
        self.body, self.out = body, body()

    def replay(self) -> Tensor:
        self.out = self.body()
        return self.out


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Put them in place of all that needs a GPU; those of programs are returned."""
    made = Programs()
    kernels = SimpleNamespace(
        attention=attend, heads=heads, embed=embed, greedy=greedy, draw=draw,
        greedy_of_ranks=greedy_of_ranks,
        linear=lambda *_: False, norm=lambda *_: False,
        activate=lambda *_: False, widen=lambda *_: False, gemm=lambda *_: False,
        record_norm=made.recording(norm),
        record_linear=made.recording(recorded_linear),
        record_attention=made.recording(attend),
        record_sum=made.recording(made.add_up), finish_program=lambda *_: True,
        run_program=made.run, run_program_of_ranks=made.run_of_ranks,
        all_reduce=lambda *_: False,
        prefill=prefill_kernel.prefill, write_kv=prefill_kernel.write_kv,
        lay_out=prefill_kernel.lay_out,
        beams=beams_kernel.beams, copy_blocks=beams_kernel.copy_blocks,
    )  # fmt: skip
    event = SimpleNamespace(synchronize=lambda: None, wait=lambda: None)
    monkeypatch.setattr(torch.ops, "lmi_multi", kernels, raising=False)
    for module in (ahead, beams, draws, executor, fused_draws, inputs, prefill_inputs):
        monkeypatch.setattr(module, "upload", lambda values, to: to.copy_(torch.tensor(values)))
    for module in (ahead, searches):
        monkeypatch.setattr(module, "download", lambda values: (values.clone(), event))
        monkeypatch.setattr(module, "recorded", lambda: event)
    for module in (beams, fused_draws, inputs):
        monkeypatch.setattr(module, "pinned", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    for module in (attention, graphs):
        monkeypatch.setattr(module, "splits", lambda *_: 1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    monkeypatch.setattr(capturing, "capture", lambda body, *_: Replayed(body))
    monkeypatch.setattr(capturing, "run", lambda body, stream: body())
    return made
