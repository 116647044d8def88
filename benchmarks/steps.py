"""Decode steps of large models on a GPU, over random weights: `python -m benchmarks.steps`.

Prompts of 128 tokens, 128 forced ones, greedy; or `--beams` rows a prompt. A step is (time of the
whole answer - time of its first token) / 127, medians of rounds, so it holds all that the host
does, for ours and for the peers alike. `roofline` is the bytes of decoder weights and cached keys
and values that a step must read, over the card's copy rate.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.bench_command import bench_timings
from benchmarks.ctranslate2_peer import CTRANSLATE2
from benchmarks.graphed import GRAPHED
from benchmarks.machine import copy_bandwidth, machine, versions
from benchmarks.peers import Peer, Task
from benchmarks.random_model import allow, check, limits_for, random_model
from benchmarks.shapes import DTYPES, SHAPES
from benchmarks.static_cache import STATIC
from lmi_multi.checkpoint.layout import QuantizeName
from lmi_multi.engine.engine import Engine
from lmi_multi.models.spec import ModelSpec
from lmi_multi.parallel.collectives import SingleRank
from lmi_multi.timing import Timing, time_generation

PEERS = {"transformers": STATIC, "torch": GRAPHED, "ctranslate2": CTRANSLATE2}

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
    peer: Annotated[list[str], typer.Option(help=f"of {', '.join(PEERS)}")] = [],  # noqa: B006
    bench: Annotated[
        bool, typer.Option(help="ours by `lmi-multi bench`, of an artifact in --work")
    ] = False,
    eager: Annotated[bool, typer.Option(help="ours without captured steps as well")] = False,
    program_rows: Annotated[
        int | None, typer.Option(help="rows up to which a step's layers are one kernel", min=0)
    ] = None,
    work: Annotated[Path | None, typer.Option(help="folder for temporary models")] = None,
    results: Annotated[Path | None, typer.Option(help="folder to add a JSON file to")] = None,
) -> None:
    """Print a line for every shape, number of rows and contender.

    Options with several values are given once a value: --peer transformers --peer torch.
    """
    peers = _peers(peer, batch, beams, quantize, work)
    if bench and (beams > 1 or eager or program_rows is not None):
        raise SystemExit("--bench is not for --beams, --eager or --program-rows")
    form = check("cuda", shape, dtype, quantize, results or Path(), prompt_tokens + new_tokens)
    device = torch.device("cuda", 0)
    tasks = [
        Task(name, form[0], batch, prompt_tokens, new_tokens, rounds, device, work)
        for name in shape
    ]
    for task in tasks:
        for contender in peers:
            contender.check(task)
    bandwidth = copy_bandwidth("cuda")
    entries = []
    for task in tasks:
        ours: Iterator[tuple[str, Timing]]
        if bench:
            ours = (("lmi_multi", timing) for timing in bench_timings(task, form[1]))
        else:
            ours = _ours(task, form[1], beams, eager, program_rows)
        for who, timing in chain(ours, _theirs(task, peers)):
            floor = _floor(
                task.spec, dtype, quantize, timing.rows, prompt_tokens, new_tokens, bandwidth
            )
            entry = {"shape": task.shape, "dtype": quantize or dtype, "who": who, "roofline": floor}
            by = {"by": "lmi-multi bench"} if bench and who == "lmi_multi" else {}
            entries.append(entry | by | asdict(timing))
            typer.echo(
                f"{task.shape:14} {quantize or dtype:5} {who:22} rows {timing.rows:3}  "
                f"step {timing.step:7.3f} ms  {floor / timing.step:4.0%} of the roofline "
                f"{floor:.2f}  first {timing.first:7.2f} ms  whole {timing.whole:8.1f} ms"
            )
    if results:
        searched = f"-beams{beams}" if beams > 1 else ""
        path = results / f"steps-{'-'.join(shape)}-{quantize or dtype}{searched}.json"
        known = versions()
        if "ctranslate2" in peer:
            known["ctranslate2"] = version("ctranslate2")
        page = {"machine": machine("cuda"), "versions": known, "bandwidth": bandwidth}
        path.write_text(json.dumps(page | {"entries": entries}, indent=1, default=vars))


def _peers(
    names: list[str], batch: list[int], beams: int, quantize: str, work: Path | None
) -> list[Peer]:
    """The peers asked for. Exit with what is wrong with them or what goes with them."""
    if any(rows % beams for rows in batch):
        shown = ", ".join(map(str, batch))
        raise SystemExit(f"--batch is {shown}; with --beams {beams} it must be multiples of that")
    for name in names:
        allow("--peer", name, PEERS)
    if names and beams > 1:
        raise SystemExit(f"--beams is {beams}; with --peer it must be 1, which peers have")
    if names and quantize:
        raise SystemExit(f"--quantize is {quantize!r}; with --peer it must be nothing")
    if work and not work.is_dir():
        raise SystemExit(f"--work is {str(work)!r}; no such folder")
    return [PEERS[name] for name in names]


def _theirs(task: Task, peers: Sequence[Peer]) -> Iterator[tuple[str, Timing]]:
    """One after the other, behind ours: a GPU has not room for all of them."""
    for peer in peers:
        gc.collect()
        torch.cuda.empty_cache()
        for timing in peer.timings(task):
            yield peer.label, timing
    gc.collect()
    torch.cuda.empty_cache()


def _ours(
    task: Task, quantize: QuantizeName | None, beams: int, eager: bool, program_rows: int | None
) -> Iterator[tuple[str, Timing]]:
    from lmi_multi.backends.cuda.executor import CudaExecutor
    from lmi_multi.backends.cuda.ops import Scratch

    spec, tensors = random_model(SHAPES[task.shape], task.dtype, quantize, task.device)
    most = task.prompt + task.tokens + 16
    limits = limits_for(spec, max(task.batches), most, max(8192, task.prompt + 1))
    for captured in (True, False) if eager else (True,):
        executor = CudaExecutor(
            spec, tensors, limits, Scratch(task.device), SingleRank(), captured, program_rows
        )
        engine = Engine(executor)
        for rows in task.batches:
            timing = time_generation(
                engine, spec, rows, task.prompt, task.tokens, task.rounds, beams
            )
            who = "lmi_multi" if captured else "lmi_multi, uncaptured"
            yield f"{who}, {beams} beams" if beams > 1 else who, timing
        engine.close()


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
