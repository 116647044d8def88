"""What a loaded model takes of a GPU beside what was planned: `python -m benchmarks.memory`.

The model is loaded as any: an artifact of a true shape through `lmi_multi.load`, its weights a hole
in a file, since their values take no memory. The plan is that of loading; what is taken is what the
driver says is free, before and after. Then every captured step and prefill is made, and at last
come the largest steps: as many rows as there may be, prompts as long as they may be, scores and
embeddings of such texts. All through the public model.
"""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer

import lmi_multi
from benchmarks import page
from benchmarks.hollow import hollow_artifact
from benchmarks.options import RESULTS, Dtype, Quantize, Results, Shapes
from benchmarks.random_model import check
from lmi_multi.backends.memory import Device
from lmi_multi.checkpoint.layout import DtypeName, QuantizeName
from lmi_multi.model import Model
from lmi_multi.network import Network
from lmi_multi.parallel.grid import Grid

# Ways in which a captured step can end: the likeliest token, one drawn by options, a search.
KINDS: tuple[dict[str, Any], ...] = ({}, {"do_sample": True, "seed": 1}, {"num_beams": 4})
log = logging.getLogger("lmi_multi")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Meter(Protocol):
    """What is known of a device's memory, in bytes."""

    def device(self) -> Device:
        """All of it, and what nobody holds."""

    def peak(self) -> int:
        """The most that was taken at once since the meter was made, of what it had been then."""

    def allocated(self) -> int:
        """What torch's tensors take."""


class GpuMeter:
    """Of the GPU that load takes, by the driver and torch's allocator."""

    def __init__(self) -> None:
        self._free = self.device().free
        torch.cuda.reset_peak_memory_stats()

    def device(self) -> Device:
        """See `Meter`. What torch keeps of dropped tensors counts as taken."""
        free, total = torch.cuda.mem_get_info(0)
        return Device("cuda:0", total, free)

    def peak(self) -> int:
        """See `Meter`. What the driver gave to others than torch's allocator stays."""
        taken = self._free - self.device().free
        return taken + torch.cuda.max_memory_reserved(0) - torch.cuda.memory_reserved(0)

    def allocated(self) -> int:
        """See `Meter`."""
        return torch.cuda.memory_allocated(0)


@dataclass(frozen=True)
class Case:
    """Bytes of one model: planned `weights`, `cache` and `workspace`; `taken` once it was loaded,
    once all graphs were made, at the peak, and what is still `kept` when it was closed; `allocated`
    by torch's tensors of what was taken by loading. `said`: what load logs."""

    shape: str
    dtype: str
    max_batch: int
    max_tokens: int
    blocks: int
    weights: int
    cache: int
    workspace: int
    loaded: int
    allocated: int
    graphs: int
    peak: int
    kept: int
    said: str

    def beside(self, taken: int) -> int:
        """What was taken beside weights and cache: the plan has `workspace` for it."""
        return taken - self.weights - self.cache

    @property
    def spare(self) -> int:
        """What is left of the workspace at the peak; below 0: so much is missing in the plan."""
        return self.workspace - self.beside(self.peak)


@app.command()
def main(
    shape: Shapes = ["flan-t5-base"],  # noqa: B006
    device: Annotated[str, typer.Option(help="cuda; cpu tries it, and measures nothing")] = "cpu",
    dtype: Dtype = "bf16",
    quantize: Quantize = "",
    max_batch: Annotated[int | None, typer.Option(help="as in load", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="as in load", min=12)] = None,
    results: Results = RESULTS,
) -> None:
    """Measure, print a line for each shape, and write DEVICE-memory.json and .md."""
    form = check(device, shape, dtype, quantize, results)
    if device == "cpu":
        for name in shape:
            with tempfile.TemporaryDirectory() as work:
                hollow_artifact(name, *form, Path(work))
                with _load(Path(work), device, max_batch, max_tokens) as model:
                    make_graphs(model)
                    fill(model)
        typer.echo("cpu: all of it runs; there is no plan of a workspace to compare")
        return
    cases = []
    for name in shape:
        case = measure(name, *form, device, max_batch, max_tokens, GpuMeter())
        typer.echo(_row(case))
        cases.append(case)
    command = page.command("benchmarks.memory")
    figures = {"cases": [asdict(case) | {"spare": case.spare} for case in cases]}
    page.write(results, f"{device}-memory", command, device, figures, _page(command, cases))


def measure(
    name: str, dtype: DtypeName, quantize: QuantizeName | None, backend: str,
    max_batch: int | None, max_tokens: int | None, meter: Meter,
) -> Case:  # fmt: skip
    """Load a model of this shape, use it up to its limits, and close it."""
    from lmi_multi.backends.cuda.sizing import sizes_on

    with tempfile.TemporaryDirectory() as work:
        artifact = hollow_artifact(name, dtype, quantize, Path(work))
        gpu = meter.device()
        network = Network.of(artifact, name)
        sizes = sizes_on(network, {0: gpu}, Grid(1, 1), max_batch, max_tokens, None)
        noted = _Noted()
        model = _load(Path(work), backend, max_batch, max_tokens, noted)
        taken, allocated = [gpu.free - meter.device().free], meter.allocated()
        limits = model.limits
        with model:
            make_graphs(model)
            taken.append(gpu.free - meter.device().free)
            fill(model)
            peak = meter.peak()
        del model
        gc.collect()
        need = sizes.ranks[0]
        return Case(
            shape=name,
            dtype=quantize or dtype,
            max_batch=limits.max_batch,
            max_tokens=limits.max_tokens,
            blocks=limits.blocks,
            weights=need.weights,
            cache=sizes.cache(0, limits),
            workspace=need.workspace,
            loaded=taken[0],
            allocated=allocated,
            graphs=taken[1],
            peak=peak,
            kept=gpu.free - meter.device().free,
            said=noted.last,
        )


class _Noted(logging.Handler):
    """The last line that load has logged."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def _load(
    folder: Path,
    backend: str,
    max_batch: int | None,
    max_tokens: int | None,
    noted: logging.Handler | None = None,
) -> Model:
    before = log.level
    if noted is not None:
        log.setLevel(logging.INFO)
        log.addHandler(noted)
    try:
        return lmi_multi.load(
            folder,
            backend=backend,
            max_batch=max_batch,
            max_tokens=max_tokens,
            prefix_caching=False,  # prompts are alike, and are all to be computed
        )
    finally:
        if noted is not None:
            log.removeHandler(noted)
            log.setLevel(before)


def make_graphs(model: Model) -> None:
    """Steps of every number of rows that is captured, in every kind; and captured prefills, of few
    keys and of many."""
    from lmi_multi.backends.cuda.graphs import sizes
    from lmi_multi.backends.cuda.prefill_inputs import MANY_KEYS

    for rows in sizes(model.limits.max_batch):
        for kind in KINDS:
            count, left = divmod(rows, kind.get("num_beams", 1))
            if not left:
                model.generate([[5] * 8] * count, kind, max_new_tokens=4)
    own: Any = model.engine.executor
    steps, prefills = getattr(own, "_fed", None), getattr(own, "_prefill_graphs", None)
    if steps is None or prefills is None:
        return
    with torch.inference_mode():
        for rows in sizes(model.limits.max_batch):
            steps.logits(rows)  # which prompts beside rows that run come to
    what = "rows" if model.spec.kind == "decoder" else "prompts"
    with torch.inference_mode():
        for tokens, keys in product(prefills.sizes, (0, MANY_KEYS)):
            if tokens <= model.limits.largest_step:
                prefills._get(what, [tokens], [keys])


def fill(model: Model) -> None:
    """The largest steps that the limits allow."""
    limits, decoder = model.limits, model.spec.kind == "decoder"
    new = min(4, limits.max_tokens - 1)
    longest = limits.max_tokens - new if decoder else limits.max_tokens
    for kind in KINDS[:2]:
        model.generate([[5] * longest] * limits.max_batch, kind, max_new_tokens=new)
    text = [5] * (limits.max_tokens // 2 if decoder else limits.max_tokens - 1)
    model.score([text], [text])
    model.encode([[5] * limits.max_tokens])


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _row(case: Case) -> str:
    beside = (case.beside(taken) for taken in (case.loaded, case.graphs, case.peak))
    figures = (case.weights, case.cache, case.workspace, *beside, case.spare, case.kept)
    shown = " | ".join(map(_gib, figures))
    return f"| {case.shape} | {case.dtype} | {case.max_batch} x {case.max_tokens} | {shown} |"


def _page(command: str, cases: Sequence[Case]) -> str:
    said = "\n".join(f"- {case.shape}: {case.said}" for case in cases)
    return f"""# What a model takes of a GPU

`{command}`
on {{where}}.

GiB. Planned: `weights`, `cache`, and `workspace` for all else, which together are the model's share
of the memory, or, where `limits` (rows x tokens) ask for no more cache, less. Measured by what the
driver says is free: what was taken beside weights and cache once the model was `loaded`, once all
`graphs` were made, and at the `peak` of the largest steps. `spare` is what the peak leaves of the
workspace: below zero the plan was short. `kept`: not given back when the model was closed. What
the process loads of kernels and libraries counts with its first model.

| shape | type | limits | weights | cache | workspace | loaded | graphs | peak | spare | kept |
| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |
{chr(10).join(map(_row, cases))}

What loading logged:

{said}
"""


if __name__ == "__main__":
    app()
