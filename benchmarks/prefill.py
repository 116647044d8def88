"""Encoders and prefills on a GPU over random weights: `python -m benchmarks.prefill`.

Milliseconds of encoding prompts with all cross-attention keys and values, for encoder-decoders, and
of prompts up to the logits of their last tokens, for decoders: medians of rounds in which the
contenders take turns, between CUDA events, so all that the host does meanwhile is in them, from
token ids on the host on.
`captured` is what the executor does by itself (a graph where there is one for so many tokens),
`kernels` the same without graphs; `torch` is plain torch over our cache, `torch, graphed` over
static caches and captured (benchmarks/graphed.py), where that covers the shape.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor

from benchmarks import page
from benchmarks.graphed import Graphed, lacking
from benchmarks.options import RESULTS, Dtype, Results, Shapes
from benchmarks.random_model import check, random_model
from benchmarks.shapes import DTYPES, SHAPES
from lmi_multi import backends
from lmi_multi.backends.base import Limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.layout import DtypeName
from lmi_multi.engine.batch import Prompt, Row
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.weights import bind
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.parallel.collectives import SingleRank

BLOCK = 16
OURS = ("captured", "kernels")
PEERS = ("torch", "torch, graphed")
Run = Callable[[], object]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One shape at one number of rows: of each contender milliseconds, one a round."""

    shape: str
    dtype: str
    rows: int
    tokens: int
    times: Mapping[str, Sequence[float]]

    def median(self, who: str) -> float | None:
        """None: it does not cover the shape."""
        return median(self.times[who]) if who in self.times else None

    @property
    def beside(self) -> float:
        """How many times as long the faster torch takes."""
        best = [
            min(median(own) for who, own in self.times.items() if who in names)
            for names in (PEERS, OURS)
        ]
        return best[0] / best[1]


def time_runs(runs: Mapping[str, Run], rounds: int, launches: int = 1) -> dict[str, list[float]]:
    """Milliseconds a run of each, which take turns, one a round."""
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
    return times


def blocks_of(i: int, tokens: int) -> range:
    each = -(-tokens // BLOCK)
    return range(i * each, (i + 1) * each)


def models(
    name: str, dtype: str, counts: Sequence[int], tokens: int, rounds: int, device: torch.device
) -> Iterator[Case]:
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
        yield Case(name, dtype, count, tokens, time_runs(runs, rounds))
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


def needs_kernels() -> str:
    """The GPU. Raises SystemExit where there is none, or no compiled kernels."""
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        raise SystemExit(f"cuda: {state.reason}")
    return f"{state.devices[0]}, torch {torch.__version__}"


@app.command()
def main(
    shape: Shapes = ["flan-t5-base"],  # noqa: B006
    dtype: Dtype = "bf16",
    rows: Annotated[list[int], typer.Option(help="prompts at once", min=1)] = [1, 4, 16, 64],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="of every prompt", min=1)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 21,
    results: Results = RESULTS,
) -> None:
    """Measure, print a line for each case, and write cuda-prefill.json and .md."""
    check("cuda", shape, dtype, "", results)
    typer.echo(needs_kernels())
    device, cases = torch.device("cuda", 0), []
    with torch.inference_mode():
        for name in shape:
            for case in models(name, dtype, rows, tokens, rounds, device):
                typer.echo(_row(case))
                cases.append(case)
    command = page.command("benchmarks.prefill")
    figures = {"cases": [asdict(case) | {"beside": case.beside} for case in cases]}
    page.write(results, "cuda-prefill", command, "cuda", figures, _page(command, cases, rounds))


def _row(case: Case) -> str:
    found = [case.median(who) for who in (*OURS, *PEERS)]
    shown = ["" if ms is None else f"{ms:.3f}" for ms in found]
    cells = [case.shape, case.dtype, f"{case.rows} x {case.tokens}", *shown, f"{case.beside:.2f}"]
    return f"| {' | '.join(cells)} |"


def _page(command: str, cases: Sequence[Case], rounds: int) -> str:
    return f"""# Encoders and prefills

`{command}`
on {{where}}.

Random weights of the true shapes. Milliseconds of encoding prompts with all cross-attention keys
and values, or of prompts up to the logits of their last tokens, from token ids on the host on:
medians of {rounds} rounds in which the contenders take turns. `captured` and `kernels` are ours,
with graphs and without; `torch` is plain torch over our cache, `torch, graphed` over static caches
and captured. `beside`: the faster of these two, over the faster of ours.

| shape | weights | prompts | captured | kernels | torch | torch, graphed | beside |
| --- | --- | --: | --: | --: | --: | --: | --: |
{chr(10).join(map(_row, cases))}
"""


if __name__ == "__main__":
    app()
