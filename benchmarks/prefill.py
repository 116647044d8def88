"""Time prefill on a GPU over random weights: ours beside the path in plain torch.

    python -m benchmarks.prefill --shape flan-t5-xxl --shape gpt-j-6b [--rows 1 4 16 64]
    python -m benchmarks.prefill --parts      # attention and products by themselves

Milliseconds of encoding prompts with all cross-attention keys and values, for encoder-decoders, and
of prompts up to the logits of their last tokens, for decoders: medians of rounds in which the
contenders take turns, between CUDA events, so all that the host does meanwhile is in them, from
token ids on the host on.
`captured` is what the executor does by itself (a graph where there is one for so many tokens),
`kernels` the same without graphs; `torch` is plain torch over our cache, `torch, graphed` over
static caches and captured (benchmarks/graphed.py), where that covers the shape.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.graphed import Graphed, lacking
from benchmarks.random_model import random_model
from benchmarks.shapes import DTYPES, SHAPES
from lmi_multi import backends
from lmi_multi.backends.base import Limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.layout import DtypeName
from lmi_multi.engine.batch import Prompt, Row
from lmi_multi.models.spec import Activation, ModelSpec, Position, RelativeBias, Rope
from lmi_multi.models.weights import Layer, Linear, Norm, bind
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.packed import PackedAttention
from lmi_multi.ops.paged import PagedAttention, PagedCache
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.parallel.collectives import SingleRank

BLOCK = 16
Run = Callable[[], object]


def time_runs(runs: Mapping[str, Run], rounds: int, launches: int = 1) -> dict[str, float]:
    """Milliseconds a run of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            torch.cuda.synchronize()
            start, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            start.record()
            for _ in range(launches):
                run()
            end.record()
            end.synchronize()
            if number >= 2:
                times[name].append(start.elapsed_time(end) / launches)
    return {name: median(own) for name, own in times.items()}


def blocks_of(i: int, tokens: int) -> range:
    each = -(-tokens // BLOCK)
    return range(i * each, (i + 1) * each)


def models(
    name: str, dtype: str, counts: Sequence[int], tokens: int, rounds: int, device: torch.device
) -> None:
    """One shape at every number of rows."""
    from lmi_multi.backends.cuda.executor import CudaExecutor
    from lmi_multi.backends.cuda.ops import Scratch

    most = max(counts)
    spec, tensors = random_model(SHAPES[name], cast(DtypeName, dtype), None, device)
    # Weights of its own: ours may change the order of some.
    plain = None
    if device.type == "cuda" and not lacking(spec, DTYPES[dtype]):
        plain = bind(*random_model(SHAPES[name], cast(DtypeName, dtype), None, device))
    blocks = most * (-(-tokens // BLOCK) + 1)
    limits = Limits(most, tokens + 1, most * tokens, blocks, BLOCK)
    executor = CudaExecutor(spec, tensors, limits, Scratch(device), SingleRank())
    chance = random.Random(0)
    for count in counts:
        ids = [[chance.randrange(2, spec.vocab) for _ in range(tokens)] for _ in range(count)]
        runs = _runs(executor, spec, ids)
        if plain is not None:
            peer = Graphed(spec, plain, count, tokens, 1, capture=True)
            runs["torch, graphed"] = partial(_prefilled, peer, ids)
        times = time_runs(runs, rounds)
        kind = "prefill" if spec.kind == "decoder" else "encoder"
        shown = "  ".join(f"{who} {ms:8.3f}" for who, ms in times.items())
        best = min(times["captured"], times["kernels"])
        print(
            f"{name:13} {dtype} {kind} {count:3} x {tokens} tokens, ms:  {shown}"
            f"  {min(own for who, own in times.items() if 'torch' in who) / best:5.2f}x",
            flush=True,
        )
    executor.close()
    del executor, tensors, plain
    gc.collect()
    torch.cuda.empty_cache()


def _prefilled(peer: Graphed, ids: list[list[int]]) -> None:
    peer.prompts.copy_(torch.tensor(ids))  # all begin with token ids on the host
    peer.begin()


def own_run(executor: Any, spec: ModelSpec, ids: Sequence[list[int]]) -> Run:
    """The prefill of prompts as the executor does it by itself: encoded, with all cross-attention
    keys and values, or decoded, up to the logits of their last tokens."""
    if spec.kind == "decoder":
        return partial(executor._next_logits, _rows(ids))
    return partial(executor._encode_to_cache, _prompts(ids))


def _runs(executor: Any, spec: ModelSpec, ids: Sequence[list[int]]) -> dict[str, Run]:
    captured = own_run(executor, spec, ids)
    if spec.kind == "decoder":
        rows = _rows(ids)

        def logits(hidden: Tensor, last: Tensor) -> Tensor:
            return executor._network.logits(hidden[last])  # type: ignore[no-any-return]

        return {
            "captured": captured,
            "kernels": lambda: logits(*executor._prefill.decode(rows)),
            "torch": lambda: logits(
                TorchExecutor._decode_part(executor, rows), executor._last_tokens(rows)
            ),
        }
    prompts = _prompts(ids)
    return {
        "captured": captured,
        "kernels": lambda: executor._prefill.encode_to_cache(prompts),
        "torch": lambda: TorchExecutor._write_cross(
            executor, prompts, TorchExecutor._encode(executor, prompts)
        ),
    }


def _rows(ids: Sequence[list[int]]) -> list[Row]:
    return [
        Row(own, 0, blocks_of(i, len(own) + 1), len(own), sample=SampleRow())
        for i, own in enumerate(ids)
    ]


def _prompts(ids: Sequence[list[int]]) -> list[Prompt]:
    return [Prompt(own, cross_blocks=blocks_of(i, len(own))) for i, own in enumerate(ids)]


# Name, heads, kv heads, head dim, position, rows, tokens.
ATTENTIONS: tuple[tuple[str, int, int, int, Position, int, int], ...] = (
    ("xxl encoder", 64, 64, 64, RelativeBias(buckets=32, max_distance=128), 1, 128),
    ("xxl encoder", 64, 64, 64, RelativeBias(buckets=32, max_distance=128), 64, 128),
    ("xxl encoder", 64, 64, 64, RelativeBias(buckets=32, max_distance=128), 4, 512),
    ("xxl encoder", 64, 64, 64, RelativeBias(buckets=32, max_distance=128), 8, 1024),
    ("xxl encoder", 64, 64, 64, RelativeBias(buckets=32, max_distance=128), 1, 2048),
    ("gptj", 16, 16, 256, Rope(dim=64), 1, 128),
    ("gptj", 16, 16, 256, Rope(dim=64), 64, 128),
    ("gptj", 16, 16, 256, Rope(dim=64), 1, 2048),
    ("llama", 32, 32, 128, Rope(dim=128), 1, 512),
    ("llama", 32, 32, 128, Rope(dim=128), 8, 512),
    ("llama", 32, 32, 128, Rope(dim=128), 2, 1024),
    ("llama", 32, 32, 128, Rope(dim=128), 64, 128),
    ("llama", 32, 32, 128, Rope(dim=128), 4, 2048),
    ("llama3", 32, 8, 128, Rope(dim=128), 1, 8192),
)


def attentions(rounds: int) -> None:
    """Rotation, cache and attention of one layer, and the rate of its two products."""
    from lmi_multi.backends.cuda.prefill import PrefillKernel
    from lmi_multi.backends.cuda.prefill_inputs import LARGE, LONG, SMALL, PrefillInputs

    device, half = torch.device("cuda", 0), torch.bfloat16
    for name, heads, kv, dim, position, rows, tokens in ATTENTIONS:
        relative = isinstance(position, RelativeBias)
        spec = ModelSpec(
            family="bench",
            vocab=8,
            hidden=8,
            ffn=8,
            heads=heads,
            kv_heads=kv,
            head_dim=dim,
            decoder_layers=1,
            encoder_layers=int(relative),
            position=position,
        )
        split, none = Heads(spec, 1), Linear(torch.empty(0))
        table = torch.randn(32, heads, device=device).to(half) if relative else None
        parts: Any = dict.fromkeys(("qkv", "out", "up", "down"), none)
        norm = Norm(torch.empty(0))
        layer = Layer(
            index=0, norm1=norm, norm2=norm, scale=dim**-0.5, position_bias=table, **parts
        )
        cache = PagedCache(split, rows * -(-tokens // BLOCK), BLOCK, half, device)
        kernel, total = PrefillKernel(split, cache), rows * tokens
        qkv = torch.randn(total, (heads + 2 * kv) * dim, device=device).to(half)
        prompts = [Prompt([0] * tokens) for _ in range(rows)]
        own = [Row([0] * tokens, 0, blocks_of(i, tokens), tokens) for i in range(rows)]
        runs: dict[str, Run] = {}
        tilings = {"small": SMALL, "large": LARGE, "long": LONG}
        for which, tiling in tilings.items():
            if tiling == LARGE and dim > 128:
                continue
            if relative:
                inputs = PrefillInputs.of_prompts(prompts, BLOCK, device, tiling)
                packed = PackedAttention(split, [tokens] * rows, inputs.positions)
                runs[which] = partial(kernel.packed, layer, qkv, inputs, None, False)
                runs["torch"] = partial(packed.attend, layer, qkv)
            else:
                inputs = PrefillInputs.of_rows(own, BLOCK, device, tiling)
                angles = split.angles(inputs.positions, inputs.reach)
                runs[which] = partial(kernel.extend, layer, qkv, inputs, angles)
                runs["torch"] = partial(PagedAttention(cache, own, device).attend, layer, qkv)
        if not relative:  # and no rotation, and nothing stored: torch's kernel by itself
            q, k, v = (
                part.reshape(rows, tokens, -1, dim).transpose(1, 2)
                for part in torch.split(qkv, [heads * dim, kv * dim, kv * dim], -1)
            )
            runs["flash"] = partial(
                F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=heads > kv
            )
        times = time_runs(runs, rounds, launches=10)
        flops = 4 * rows * tokens * tokens * heads * dim / (1 if relative else 2)
        shown = "  ".join(f"{who} {1000 * ms:9.1f}" for who, ms in times.items())
        best = min(times[who] for who in tilings if who in times)
        what = f"{name} {heads}/{kv}x{dim}, {rows} x {tokens} tokens"
        rate = f"{times['torch'] / best:5.2f}x  {flops / best / 1e9:5.0f} TFLOP/s"
        print(f"{what:40} us: {shown}  {rate}", flush=True)


# Name, features, outputs, what comes behind a bias or a gate, and whether there is a gate, or a
# residual.
PRODUCTS: tuple[tuple[str, int, int, Activation | None, bool, bool], ...] = (
    ("xxl qkv", 4096, 12288, None, False, False),
    ("xxl out", 4096, 4096, None, False, True),
    ("xxl up", 4096, 20480, "gelu_tanh", True, False),
    ("xxl down", 10240, 4096, None, False, True),
    ("xl up", 2048, 10240, "gelu_tanh", True, False),
    ("large up", 1024, 5632, "gelu_tanh", True, False),
    ("llama up", 4096, 22016, "silu", True, False),
    ("gptj up", 4096, 16384, "gelu_tanh", False, False),
    ("neox up", 4096, 16384, "gelu", False, False),
)


def products(rounds: int) -> None:
    """Large products and what follows them: by our kernel, and by cuBLAS with a kernel behind it
    where it has no such epilogue; and the rate of the faster one."""
    from lmi_multi.backends.cuda.ops import CudaOps, Scratch

    device, half = torch.device("cuda", 0), torch.bfloat16
    ops = CudaOps(Scratch(device))
    by_cublas = CudaOps(Scratch(device))
    by_cublas._pairs = 0  # as on a GPU that has no such kernel
    for (name, features, outputs, kind, gated, added), tokens in product(
        PRODUCTS, (1024, 2048, 4096, 8192)
    ):
        weight = (torch.randn(outputs, features, device=device) / 64).to(half)
        bias = torch.randn(outputs, device=device).to(half) if kind and not gated else None
        linear, x = Linear(weight, bias), torch.randn(tokens, features, device=device).to(half)
        runs: dict[str, Run] = {}
        if added:
            residual = torch.randn(tokens, outputs, device=device).to(half)
            runs["ours"] = partial(ops._gemm, x, linear, half, residual)
            runs["cuBLAS"] = partial(by_cublas.linear_residual, x, linear, residual)
        else:
            runs["ours"] = partial(ops._gemm, x, linear, half, None, kind, gated)
            runs["cuBLAS"] = partial(by_cublas.linear, x, linear, kind, gated)
        times = time_runs(runs, rounds, launches=10)
        shown = "  ".join(f"{who} {1000 * ms:8.1f}" for who, ms in times.items())
        rate = 2 * tokens * features * outputs / min(times.values()) / 1e9
        print(f"{name:9} {tokens:5} tokens, us: {shown}  {rate:5.0f} TFLOP/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time prefill on a GPU.")
    parser.add_argument("--shape", action="append", default=[], choices=SHAPES)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=128, help="of every prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", action="store_true", help="attention and products alone")
    options = parser.parse_args()
    if not options.shape and not options.parts:
        parser.error("name a --shape, or --parts")
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        raise SystemExit(f"cuda: {state.reason}")
    print(f"{state.devices[0]}, torch {torch.__version__}")
    with torch.inference_mode():
        for name in options.shape:
            device = torch.device("cuda", 0)
            models(name, options.dtype, options.rows, options.tokens, options.rounds, device)
        if options.parts:
            attentions(options.rounds)
            products(options.rounds)


if __name__ == "__main__":
    main()
