"""Decode steps of large models on a GPU, over random weights: `python -m benchmarks.steps`.

Prompts of 128 tokens, 128 forced ones, greedy; or `--beams` rows a prompt. A step is (time of the
whole answer - time of its first token) / 127, medians of rounds, so it holds all that the host
does. `roofline` is the bytes of decoder weights and cached keys and values that a step must read,
over the card's copy rate.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import torch
import typer

from benchmarks.machine import copy_bandwidth, machine, versions
from benchmarks.random_model import limits_for, random_model
from benchmarks.shapes import DTYPES, SHAPES
from lmi_multi import backends
from lmi_multi.checkpoint.layout import DtypeName, QuantizeName
from lmi_multi.engine.engine import Engine
from lmi_multi.models.spec import ModelSpec
from lmi_multi.parallel.collectives import SingleRank
from lmi_multi.timing import Timing, time_generation

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    shape: Annotated[list[str], typer.Option(help=f"of {', '.join(SHAPES)}")],
    dtype: Annotated[str, typer.Option(help=f"of {', '.join(DTYPES)}")] = "bf16",
    quantize: Annotated[str, typer.Option(help="int8, fp8, or nothing")] = "",
    batch: Annotated[list[int], typer.Option(help="rows at once", min=1)] = [1, 4, 16, 64],  # noqa: B006
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    beams: Annotated[
        int, typer.Option(help="rows that are one prompt's; ours alone has more than 1", min=1)
    ] = 1,
    peer: Annotated[bool, typer.Option(help="transformers with a static, compiled cache")] = False,
    eager: Annotated[bool, typer.Option(help="ours without captured steps as well")] = False,
    program_rows: Annotated[
        int | None, typer.Option(help="rows up to which a step's layers are one kernel", min=0)
    ] = None,
    results: Annotated[Path | None, typer.Option(help="folder to add a JSON file to")] = None,
) -> None:
    """Print a line for every shape, number of rows and contender."""
    if any(rows % beams for rows in batch):
        shown = ", ".join(map(str, batch))
        raise SystemExit(f"--batch is {shown}; with --beams {beams} it must be multiples of that")
    if peer and beams > 1:
        raise SystemExit(f"--beams is {beams}; with --peer it must be 1, which the peer has")
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        raise SystemExit(f"cuda: {state.reason}")
    device = torch.device("cuda", 0)
    bandwidth = copy_bandwidth("cuda")
    entries = []
    for name in shape:
        for who, spec, timing in _timings(
            name,
            dtype,
            quantize,
            batch,
            prompt_tokens,
            new_tokens,
            rounds,
            beams,
            peer,
            eager,
            program_rows,
            device,
        ):
            floor = _floor(spec, dtype, quantize, timing.rows, prompt_tokens, new_tokens, bandwidth)
            entry = {"shape": name, "dtype": quantize or dtype, "who": who, "roofline": floor}
            entries.append(entry | asdict(timing))
            typer.echo(
                f"{name:14} {quantize or dtype:5} {who:22} rows {timing.rows:3}  "
                f"step {timing.step:7.3f} ms  {floor / timing.step:4.0%} of the roofline "
                f"{floor:.2f}  first {timing.first:7.2f} ms  whole {timing.whole:8.1f} ms"
            )
    if results:
        searched = f"-beams{beams}" if beams > 1 else ""
        path = results / f"steps-{'-'.join(shape)}-{quantize or dtype}{searched}.json"
        page = {"machine": machine("cuda"), "versions": versions(), "bandwidth": bandwidth}
        path.write_text(json.dumps(page | {"entries": entries}, indent=1, default=vars))


def _timings(
    name: str, dtype: str, quantize: str, batches: list[int], prompt: int, tokens: int,
    rounds: int, beams: int, peer: bool, eager: bool, program_rows: int | None,
    device: torch.device,
) -> Iterator[tuple[str, ModelSpec, Timing]]:  # fmt: skip
    from lmi_multi.backends.cuda.executor import CudaExecutor
    from lmi_multi.backends.cuda.ops import Scratch

    form = cast(DtypeName, dtype), cast("QuantizeName | None", quantize or None)
    spec, tensors = random_model(SHAPES[name], *form, device)
    most = prompt + tokens + 16
    limits = limits_for(spec, max(batches), most, max(8192, prompt + 1))
    for captured in (True, False) if eager else (True,):
        executor = CudaExecutor(
            spec, tensors, limits, Scratch(device), SingleRank(), captured, program_rows
        )
        engine = Engine(executor)
        for rows in batches:
            timing = time_generation(engine, spec, rows, prompt, tokens, rounds, beams)
            who = "lmi_multi" if captured else "lmi_multi, uncaptured"
            yield f"{who}, {beams} beams" if beams > 1 else who, spec, timing
        engine.close()
    del executor, engine, tensors
    gc.collect()
    torch.cuda.empty_cache()
    if peer and not quantize:
        for timing in _transformers(name, dtype, batches, prompt, tokens, rounds):
            yield "transformers, static", spec, timing


@torch.inference_mode()
def _transformers(
    name: str, dtype: str, batches: list[int], prompt: int, tokens: int, rounds: int
) -> Iterator[Timing]:
    """`generate` with a static cache, which compiles the step and captures it as a graph."""
    model: Any = SHAPES[name].build(DTYPES[dtype], "cuda")
    for rows in batches:
        ids = torch.randint(2, 30000, (rows, prompt), device="cuda")

        def run(count: int, ids: torch.Tensor = ids) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                cache_implementation="static",
            )
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

        for _ in range(2):
            run(tokens)
        first = median(run(1) for _ in range(rounds))
        whole = median(run(tokens) for _ in range(rounds))
        yield Timing(rows, first, whole, (whole - first) / (tokens - 1))


def _floor(
    spec: ModelSpec, dtype: str, quantize: str, rows: int, prompt: int, tokens: int, rate: float
) -> float:
    """Milliseconds to read a step's bytes once, at a context in the middle of the answer."""
    item = DTYPES[dtype].itemsize
    cross = spec.kind == "encoder-decoder"
    h, heads, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = h * (heads + 2 * kv) + heads * h + spec.ffn * h * (3 if spec.gated else 2)
    layer += 2 * h * heads if cross else 0
    weights = spec.decoder_layers * layer + spec.vocab * spec.embed_dim
    context = tokens / 2 + prompt  # an encoder-decoder's prompt is read by cross-attention
    cache = rows * spec.decoder_layers * 2 * kv * context
    return 1000 * (weights * (1 if quantize else item) + cache * item) / rate


if __name__ == "__main__":
    app()
