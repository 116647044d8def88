"""Time every CUDA kernel against the bytes it must move, and against plain torch.

    python -m benchmarks.kernels [--rows 1 4 16] [--attention | --beams 4] [--bandwidth 4.8]

Each case is a CUDA graph of launches over different weights or caches, in all more than L2 holds,
so every byte comes from memory. Times are medians of replays, a launch. `roofline` is the bytes
read once over --bandwidth (TB/s; an H200's by its datasheet).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmi_multi import backends
from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Row
from lmi_multi.models.spec import ModelSpec, RelativeBias, Rope
from lmi_multi.models.weights import Layer, Linear, Norm
from lmi_multi.ops import Attention, Ops
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.paged import PagedAttention, PagedCache
from lmi_multi.ops.reference import Reference

FOOTPRINT = 256 << 20  # bytes that a graph goes through, some times an H200's L2
MOST_LAUNCHES = 96
WARM_UP, REPLAYS = 10, 15
EPS = 1e-6
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One kernel on one shape: what it must read, and how to launch it on the n-th operands."""

    name: str
    rows: int
    bytes: int
    ours: Sequence[Run]
    torch: Sequence[Run]


def capture(runs: Sequence[Run]) -> torch.cuda.CUDAGraph:
    """A graph of all launches, one after the other."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for run in runs[:2]:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    return graph


def measure(*contenders: Sequence[Run]) -> list[float]:
    """Microseconds a launch of each contender; they take turns."""
    graphs = [capture(runs) for runs in contenders]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(WARM_UP + REPLAYS):
        for graph, runs, own in zip(graphs, contenders, times, strict=True):
            start, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            own.append(start.elapsed_time(end) * 1000 / len(runs))
    return [statistics.median(own[WARM_UP:]) for own in times]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, device="cuda", dtype=dtype)
    return torch.randn(*shape, device="cuda").mul(shape[-1] ** -0.5).to(dtype)


# Name, inputs, weight rows, and which operation it is part of.
PRODUCTS = (
    ("xxl qkv", 4096, 12288, "norm"),
    ("xxl out", 4096, 4096, "residual"),
    ("xxl up", 4096, 20480, "gated"),
    ("xxl down", 10240, 4096, "residual"),
    ("xxl head", 4096, 32128, "plain"),
    ("gptj down", 16384, 4096, "residual"),
    ("base qkv", 768, 2304, "norm"),
    ("base out", 768, 768, "residual"),
    ("base up", 768, 4096, "gated"),
    ("base down", 2048, 768, "residual"),
)


def products(ops: Ops, rows: int, x_type: torch.dtype, w_type: torch.dtype) -> Iterator[Case]:
    for name, inputs, outputs, kind in PRODUCTS:
        size = inputs * outputs * w_type.itemsize
        count = min(max(FOOTPRINT // size, 2), MOST_LAUNCHES)
        scale = torch.rand(outputs, device="cuda") if w_type == torch.int8 else None
        linears = [Linear(random(outputs, inputs, dtype=w_type), None, scale) for _ in range(count)]
        norm = Norm(random(inputs, dtype=x_type))
        x = random(rows, inputs, dtype=x_type)
        residual = random(rows, outputs, dtype=x_type)

        def run(ops: Ops, linear: Linear, kind: str, x: Tensor, norm: Norm, rest: Tensor) -> Tensor:
            if kind == "plain":
                return ops.linear(x, linear)
            if kind == "residual":
                return ops.linear_residual(x, linear, rest)
            gated = kind == "gated"
            return ops.norm_linear(x, norm, EPS, linear, "gelu_tanh" if gated else None, gated)

        ours, theirs = (
            [partial(run, which, linear, kind, x, norm, residual) for linear in linears]
            for which in (ops, Reference())
        )
        yield Case(f"{name} {kind} {str(w_type)[6:]}", rows, size, ours, theirs)


# Name, heads, kv heads, head dim, tokens.
ATTENTIONS = (
    ("xxl self", 64, 64, 64, 256),
    ("xxl cross", 64, 64, 64, 128),
    ("base self", 12, 12, 64, 64),
    ("base cross", 12, 12, 64, 128),
    ("gptj self", 16, 16, 256, 256),
    ("llama self", 32, 32, 128, 256),
    ("llama3 self", 32, 8, 128, 256),
    ("llama3 self", 32, 8, 128, 4096),
)


def attentions(rows: int) -> Iterator[Case]:
    from lmi_multi.backends.cuda.attention import CudaPagedAttention, DecodeAttention
    from lmi_multi.backends.cuda.ops import Scratch

    device = torch.device("cuda")
    for name, heads, kv, dim, tokens in ATTENTIONS:
        relative = name.startswith(("xxl", "base"))
        size = 2 * rows * tokens * kv * dim * 2
        layers = min(max(FOOTPRINT // size, 2), 32)
        spec = ModelSpec(
            family="bench",
            vocab=8,
            hidden=8,
            ffn=8,
            heads=heads,
            kv_heads=kv,
            head_dim=dim,
            decoder_layers=layers,
            encoder_layers=int(relative),
            position=RelativeBias(buckets=32, max_distance=128) if relative else Rope(dim=dim),
        )
        blocks = tokens // 16
        cache = PagedCache(Heads(spec, 1), rows * blocks, 16, torch.bfloat16, device)
        for pool in (*cache.k, *cache.v):
            pool.normal_()
        own = [range(i * blocks, (i + 1) * blocks) for i in range(rows)]
        batch = [Row([0], tokens - 1, b, tokens, cross_blocks=b, cross_length=tokens) for b in own]
        none = Linear(torch.empty(0))
        parts: Any = dict.fromkeys(("qkv", "out", "up", "down"), none)
        norm = Norm(torch.empty(0))
        table = random(32, heads, dtype=torch.bfloat16) if relative else None
        shape = [
            Layer(index=i, norm1=norm, norm2=norm, scale=1.0, position_bias=table, **parts)
            for i in range(layers)
        ]
        qkv = random(rows, (heads + 2 * kv) * dim, dtype=torch.bfloat16)
        q = qkv[:, : heads * dim].contiguous()

        def run(attention: Attention, layer: Layer, name: str, qkv: Tensor, q: Tensor) -> Tensor:
            if "cross" in name:
                return attention.cross_attend(layer, q)
            return attention.attend(layer, qkv)

        both = (
            CudaPagedAttention(cache, batch, device, DecodeAttention(cache, Scratch(device))),
            PagedAttention(cache, batch, device),
        )
        for attention in both:  # what is made once a step is made before the graph
            run(attention, shape[0], name, qkv, q)
        ours, theirs = (
            [partial(run, attention, layer, name, qkv, q) for layer in shape] for attention in both
        )
        yield Case(f"{name} {heads}/{kv}x{dim} {tokens} tokens", rows, size, ours, theirs)


def searches(rows: int, width: int) -> Iterator[Case]:
    """How searches of `width` beams go on; and blocks copied for all but one beam of each."""
    from lmi_multi.backends.cuda.beams import BeamInputs, BeamKind
    from lmi_multi.backends.cuda.inputs import StepInputs
    from lmi_multi.backends.cuda.ops import Scratch

    device, kind = torch.device("cuda"), BeamKind(width, 2 * width)
    limits = Limits(rows, max_tokens=256, max_step_tokens=256, blocks=2 * rows, block_size=16)
    inputs, scratch = StepInputs(limits, rows, False, device), Scratch(device)
    beams = BeamInputs(inputs)
    inputs.fill([Row([5], 100, [i], 1) for i in range(rows)])
    for vocab in (32128, 128256):
        every = [random(rows, vocab, dtype=torch.bfloat16) for _ in range(8)]
        ours = [partial(beams.step, logits, kind, scratch) for logits in every]
        theirs: list[Run] = [
            lambda logits=logits: beams.best(logits.float(), kind)  # type: ignore[misc]
            for logits in every
        ]
        yield Case(f"{width} beams {vocab} tokens", rows, every[0].nbytes, ours, theirs)
    cache = random(24, 2, 2 * rows, 16, 64, 64, dtype=torch.bfloat16)
    pairs = torch.tensor([[i, rows + i] for i in range(rows) if i % width], device=device)
    sources, targets = pairs.unbind(1)
    size = 2 * len(pairs) * cache[:, :, 0].nbytes
    copied = partial(torch.ops.lmi_multi.copy_blocks, cache, pairs.int())

    def by_torch() -> None:
        cache.index_copy_(2, targets, cache.index_select(2, sources))

    yield Case(f"xxl {len(pairs)} blocks copied", rows, size, [copied] * 4, [by_torch] * 4)


def show(case: Case, bandwidth: float) -> None:
    ours, theirs = measure(case.ours, case.torch)
    roofline = case.bytes / bandwidth / 1e6
    print(
        f"{case.name:34}{case.rows:5}{ours:9.2f}{case.bytes / ours / 1e6:7.2f}"
        f"{roofline / ours:10.0%}{theirs:9.2f}{theirs / ours:8.2f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CUDA kernels.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--attention", action="store_true", help="nothing else")
    parser.add_argument("--beams", type=int, default=0, help="searches of so many, nothing else")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s of the roofline")
    options = parser.parse_args()
    if options.beams and (options.beams < 2 or any(n % options.beams for n in options.rows)):
        parser.error(f"--beams is {options.beams}; allowed: 2 or more that divide all --rows")
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        raise SystemExit(f"cuda: {state.reason}")
    from lmi_multi.backends.cuda.ops import CudaOps, Scratch

    every = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16, torch.int8), 64)
    ops = CudaOps(Scratch(torch.device("cuda")), every)
    print(f"{state.devices[0]}, torch {torch.__version__}")
    print(
        f"{'kernel':34}{'rows':>5}{'us':>9}{'TB/s':>7}{'roofline':>10}{'torch us':>9}{'faster':>9}"
    )
    half = torch.bfloat16
    with torch.inference_mode():
        for rows in options.rows:
            if options.beams:
                for case in searches(rows, options.beams):
                    show(case, options.bandwidth)
                continue
            types_of_products = (half, half), (half, torch.int8), (torch.float32, torch.float32)
            for types in () if options.attention else types_of_products:
                for case in products(ops, rows, *types):
                    show(case, options.bandwidth)
            for case in attentions(rows):
                show(case, options.bandwidth)


if __name__ == "__main__":
    main()
