"""Parts of a prefill on a GPU, by themselves: `python -m benchmarks.prefill_parts`.

Rotation, cache and attention of one layer beside plain torch and torch's flash attention; large
products with what follows them, by our kernel and by cuBLAS. Microseconds, medians of rounds of ten
launches, between CUDA events.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from benchmarks.prefill import BLOCK, Run, blocks_of, needs_kernels, time_runs
from lmi_multi.engine.batch import Prompt, Row
from lmi_multi.models.spec import Activation, ModelSpec, Position, RelativeBias, Rope
from lmi_multi.models.weights import Layer, Linear, Norm
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.packed import PackedAttention
from lmi_multi.ops.paged import PagedAttention, PagedCache

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

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
    from lmi_multi.backends.cuda.prefill_inputs import LONG, SHORT, PrefillInputs

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
        for which, tiling in {"short": SHORT, "long": LONG}.items():
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
        times = _medians(runs, rounds)
        flops = 4 * rows * tokens * tokens * heads * dim / (1 if relative else 2)
        shown = "  ".join(f"{who} {1000 * ms:9.1f}" for who, ms in times.items())
        best = min(times[who] for who in ("short", "long") if who in times)
        what = f"{name} {heads}/{kv}x{dim}, {rows} x {tokens} tokens"
        rate = f"{times['torch'] / best:5.2f}x  {flops / best / 1e9:5.0f} TFLOP/s"
        print(f"{what:40} us: {shown}  {rate}", flush=True)


# Name, features, outputs, what comes behind a bias or a gate, and whether there is a gate, or a
# residual.
PRODUCTS: tuple[tuple[str, int, int, Activation | None, bool, bool], ...] = (
    ("xxl qkv", 4096, 12288, None, False, False),
    ("xxl cross", 4096, 8192, None, False, False),
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
        times = _medians(runs, rounds)
        shown = "  ".join(f"{who} {1000 * ms:8.1f}" for who, ms in times.items())
        rate = 2 * tokens * features * outputs / min(times.values()) / 1e9
        print(f"{name:9} {tokens:5} tokens, us: {shown}  {rate:5.0f} TFLOP/s", flush=True)


def _medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds a launch."""
    return {name: median(own) for name, own in time_runs(runs, rounds, launches=10).items()}


@app.command()
def main(rounds: Annotated[int, typer.Option(min=1)] = 7) -> None:
    """Measure, and print a line for each."""
    typer.echo(needs_kernels())
    with torch.inference_mode():
        attentions(rounds)
        products(rounds)


if __name__ == "__main__":
    app()
