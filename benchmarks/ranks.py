"""One model on several GPUs of a host: `python -m benchmarks.ranks --degree 2`.

Sums first: residual + (sum over ranks + bias) of a bfloat16 row, as a step has it behind every
sub-layer, a hundred in a CUDA graph, each of what the last one left; by the kernel over peer memory
and by NCCL with torch's additions behind. Then decode steps over random weights made where they are
used, as in `benchmarks.steps`, on one GPU and shared by slices; `share` is the one's time over the
other's.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.machine import machine, versions
from benchmarks.random_model import check, limits_for, random_model
from benchmarks.shapes import DTYPES, SHAPES
from lmi_multi.backends.base import Executor, Limits
from lmi_multi.checkpoint.layout import DtypeName, QuantizeName
from lmi_multi.engine.batch import Batch, StepResult
from lmi_multi.engine.engine import Engine
from lmi_multi.models.spec import ModelSpec
from lmi_multi.parallel.collectives import Near, Peers, SingleRank, TorchCollectives
from lmi_multi.parallel.executor import RankedExecutor
from lmi_multi.parallel.local import LocalRanks
from lmi_multi.timing import Timing, time_generation

SIZES = tuple(2**n for n in range(11, 19))  # bytes
SUMS, REPLAYS = 100, 15
LOADING = 200.0  # seconds that a model may take to be made and captured

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    degree: Annotated[int, typer.Option(help="GPUs to share a model", min=2)] = 2,
    shape: Annotated[list[str], typer.Option(help=f"of {', '.join(SHAPES)}")] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help=f"of {', '.join(DTYPES)}")] = "bf16",
    quantize: Annotated[str, typer.Option(help="int8, fp8, or nothing")] = "",
    batch: Annotated[list[int], typer.Option(help="rows at once", min=1)] = [1],  # noqa: B006
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    results: Annotated[Path | None, typer.Option(help="folder to add a JSON file to")] = None,
) -> None:
    """Print a line for every size of a sum, and one for every shape and number of rows."""
    form = check("cuda", shape, dtype, quantize, results or Path(), prompt_tokens + new_tokens)
    count = torch.cuda.device_count()
    if degree > count:
        raise SystemExit(f"cuda: {degree} GPUs wanted, {count} here")
    ranks = LocalRanks(degree, Member, "nccl")
    steps: list[dict[str, Any]] = []
    try:
        sums = ranks.call("sums")
        for size, near, nccl in sums:
            own = "none" if near is None else f"{near:6.2f} us"
            typer.echo(f"{size:7} bytes  over peer memory {own}  NCCL {nccl:6.2f} us")
        for name in shape:
            work = Work(name, *form, max(batch), prompt_tokens, new_tokens)
            alone = work.timings(*work.open(torch.device("cuda", 0), SingleRank()), batch, rounds)
            spec, limits = ranks.call("open", work, still=LOADING)
            shared = work.timings(spec, Shared(ranks, limits, f"{degree} GPUs"), batch, rounds)
            for one, several in zip(alone, shared, strict=True):
                steps.append({"shape": name, "alone": asdict(one), "shared": asdict(several)})
                typer.echo(
                    f"{name:14} {quantize or dtype:5} rows {one.rows:3}  step {one.step:7.3f} ms, "
                    f"on {degree} GPUs {several.step:7.3f}: share {several.step / one.step:.3f}"
                )
    finally:
        ranks.close()
    if results:
        page = {"machine": machine("cuda"), "versions": versions(), "degree": degree}
        kind = quantize or dtype
        path = results / f"ranks-{degree}-{kind}.json"
        path.write_text(json.dumps(page | {"dtype": kind, "sums": sums, "steps": steps}, indent=1))


@dataclass(frozen=True)
class Work:
    """A shape and what to time on it; `rows` at most."""

    shape: str
    dtype: DtypeName
    quantize: QuantizeName | None
    rows: int
    prompt: int
    tokens: int

    def open(self, device: torch.device, peers: Peers) -> tuple[ModelSpec, Executor]:
        """A rank's share of the model."""
        from lmi_multi.backends.cuda.executor import CudaExecutor
        from lmi_multi.backends.cuda.ops import Scratch

        spec, tensors = random_model(
            SHAPES[self.shape], self.dtype, self.quantize, device, peers.size
        )
        most = self.prompt + self.tokens + 16
        limits = limits_for(spec, self.rows, most, max(8192, self.prompt + 1))
        return spec, CudaExecutor(spec, tensors, limits, Scratch(device), peers)

    def timings(
        self, spec: ModelSpec, executor: Executor, batches: list[int], rounds: int
    ) -> list[Timing]:
        """One for each number of rows; closes the executor."""
        engine = Engine(executor)
        found = [
            time_generation(engine, spec, rows, self.prompt, self.tokens, rounds)
            for rows in batches
        ]
        engine.close()
        return found


class Shared(RankedExecutor):
    """Of ranks that go on to another model."""

    def close(self) -> None:
        """Let the ranks drop this one."""
        self._ranks.call("drop")


class Member:
    """A rank on a GPU of its own."""

    def __init__(self, rank: int, size: int) -> None:
        from lmi_multi.backends.cuda import kernels
        from lmi_multi.backends.cuda.near import connect_memory

        if missing := kernels.missing():
            raise SystemExit(f"cuda: compiled kernels are {missing}")
        logging.basicConfig(level=logging.INFO)  # whether sums go over peer memory, or why not
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.peers = TorchCollectives()
        connect_memory(self.peers, self.device)

    @torch.inference_mode()
    def sums(self) -> list[tuple[int, float | None, float]]:
        """Bytes, and microseconds of a sum over peer memory, None where there is none, and of
        NCCL's."""
        near = self.peers.near
        return [
            (size, None if near is None else self._timed(size, near), self._timed(size, None))
            for size in SIZES
        ]

    def _timed(self, size: int, near: Near | None) -> float:
        kept, self.peers.near = self.peers.near, near
        x, residual, bias = (
            torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
            for shape in ((1, size // 2), (1, size // 2), (size // 2,))
        )

        def work() -> Tensor:
            found = residual
            for _ in range(SUMS):
                found = self.peers.add_reduced(found, x, bias)
            return found

        graph = _captured(work)
        times: list[float] = []
        for _ in range(REPLAYS):
            start, end = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / SUMS)
        self.peers.check()
        self.peers.near = kept
        return median(times)

    def open(self, work: Work) -> tuple[ModelSpec, Limits]:
        """This rank's share of a model, until `drop`."""
        spec, self.executor = work.open(self.device, self.peers)
        return spec, self.executor.limits

    def step(self, batch: Batch) -> StepResult:
        """See `Executor.step`."""
        return self.executor.step(batch)

    def drop(self) -> None:
        """Close what `open` opened."""
        self.executor.close()
        del self.executor
        gc.collect()


def _captured(work: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph


if __name__ == "__main__":
    app()
