"""How a GPU's memory is divided, on GPUs that are made up: what fits, and what is said if not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import BACKEND, backend
from lmi_multi.backends.cuda.sizing import Sizes, sizes_on

from lmi_multi import load
from lmi_multi.backends.limits import block_bytes
from lmi_multi.backends.memory import IDLE_TOKENS, Device, workspace_bytes
from lmi_multi.checkpoint.convert import convert
from lmi_multi.demo import CHECKPOINT
from lmi_multi.errors import CapacityError, OptionError
from lmi_multi.models.registry import FAMILIES
from lmi_multi.models.spec import Alibi, Learned, ModelSpec, RelativeBias, Rope
from lmi_multi.network import Network
from lmi_multi.parallel.grid import Grid

GIB = 2**30
LLAMA = ModelSpec(  # Llama 2 7B
    family="llama", vocab=32000, hidden=4096, heads=32, ffn=11008, position=Rope(dim=128),
    decoder_layers=32, norm="rms", gated=True, activation="silu", max_positions=4096,
)  # fmt: skip


def network(**changes: Any) -> Network:
    family = next(family for family in FAMILIES if family.name == "llama")
    spec = replace(LLAMA, **changes)
    modules = (name for name, weight in family.weights(spec).items())
    return Network("big", spec, tuple(f"{name}.weight" for name in modules), "bf16", None, True)


def gpus(count: int, total: float, free: float | None = None) -> list[Device]:
    sizes = int(total * GIB), int((total - 0.5 if free is None else free) * GIB)
    return [Device(f"cuda:{i}", *sizes) for i in range(count)]


def plan(
    network: Network,
    devices: list[Device],
    degree: int = 1,
    max_batch: int | None = None,
    max_tokens: int | None = None,
    share: float | None = None,
    stages: int = 1,
) -> Sizes:
    grid, gpus = Grid(degree, stages), dict(enumerate(devices))
    return sizes_on(network, gpus, grid, max_batch, max_tokens, share)


def taken(sizes: Sizes, rank: int) -> int:
    need = sizes.ranks[rank]
    return need.weights + need.workspace + sizes.cache(rank, sizes.limits)


def refusal(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(CapacityError) as error:
        plan(*arguments, **keywords)
    return str(error.value)


@pytest.mark.parametrize("share", [None, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("degree", "total"), [(1, 80), (1, 44), (2, 22.4), (8, 22.4)])
def test_everything_together_stays_within_the_share(
    share: float | None, degree: int, total: float
) -> None:
    devices = gpus(8, total)
    sizes = plan(network(), devices, degree, max_batch=256, share=share)
    budget = min(int((share or 0.9) * devices[0].total), devices[0].free)
    block = block_bytes(LLAMA, 2, degree, 16)
    assert set(sizes.ranks) == set(range(degree))
    for rank in sizes.ranks:
        assert budget - block < taken(sizes, rank) <= budget
        assert sizes.cache(rank, sizes.limits) == sizes.limits.blocks * block
        assert sizes.ranks[rank].weights == network().weight_bytes("bf16", None, degree)


def test_the_fullest_gpu_decides() -> None:
    devices = [*gpus(1, 80), Device("cuda:1", 80 * GIB, 30 * GIB)]
    alone, both = (plan(network(), devices, n, max_batch=256) for n in (1, 2))
    assert taken(alone, 0) > 71 * GIB
    assert max(taken(both, rank) for rank in (0, 1)) <= 30 * GIB
    assert "cuda:1 has 2.0 GiB of 80.0 GiB free" in refusal(
        network(), [devices[0], replace(devices[1], free=2 * GIB)], 2
    )


def test_a_small_cache_is_no_larger_than_asked_for() -> None:
    sizes = plan(network(), gpus(1, 80), max_batch=4, max_tokens=160)
    assert (sizes.limits.max_batch, sizes.limits.blocks) == (4, 4 * 10)


def test_what_fits_is_said_with_the_fewest_changes() -> None:
    text = refusal(network(), gpus(4, 15))
    assert text.startswith(
        "big does not fit at tensor_parallel=1: of each GPU weights need 12.6 GiB and steps "
    )
    assert (
        "cuda:0 has 14.5 GiB of 15.0 GiB free, of which memory_share=0.9 allows 13.5 GiB: " in text
    )
    assert text.endswith(
        "; what would fit: tensor_parallel=2; or quantize='int8'; or quantize='fp8'"
    )
    wide = replace(network(), dtype="fp32")
    assert refusal(wide, gpus(1, 20)).endswith(
        "what would fit: quantize='int8'; or quantize='fp8'; or dtype='bf16'"
    )
    narrow = replace(network(), dtype="fp32")
    assert refusal(narrow, gpus(1, 11)).endswith(
        "what would fit: dtype='bf16', quantize='int8'; or dtype='bf16', quantize='fp8'"
    )


@pytest.mark.parametrize(
    ("kind", "total"), [("int8", 15), ("fp8", 15), (None, 22.4), ("int8", 12.5)]
)
def test_what_is_advised_does_fit(kind: str | None, total: float) -> None:
    """Each way that is named is planned, and what is not named does not fit."""
    devices = gpus(2, total)
    for dtype in ("fp32", "bf16"):
        asked = replace(network(), dtype=dtype)
        try:
            plan(asked, devices)
            continue
        except CapacityError as error:
            ways = str(error).partition("what would fit: ")[2]
        other = replace(asked, quantize=kind)  # type: ignore[arg-type]
        alone = f"quantize='{kind}'" in ways.split("; or ")
        if kind is not None and alone:
            assert plan(other, devices).limits
        elif kind is not None:
            refusal(other, devices)


def test_a_missing_row_of_cache_is_part_of_it() -> None:
    text = refusal(network(), gpus(1, 17), max_tokens=4096)
    assert "a row of 4096 tokens needs 2.00 GiB of cache, but only " in text
    assert "what would fit: quantize='int8'; or quantize='fp8'" in text


def test_else_the_smallest_instance_is_named() -> None:
    assert refusal(network(), gpus(1, 4)).endswith(
        "nothing would fit here; g5.xlarge takes it with dtype='bf16', quantize=None, "
        "tensor_parallel=1"
    )
    huge = network(hidden=65536, heads=512, kv_heads=512, ffn=262_144, decoder_layers=80)
    assert refusal(huge, gpus(1, 4)).endswith(
        "nothing would fit here, nor any instance in this format"
    )


def test_limits_that_cannot_be_are_option_errors() -> None:
    for keywords in ({"max_tokens": 5000}, {"max_batch": 0}):
        with pytest.raises(OptionError, match=next(iter(keywords))):
            plan(network(), gpus(1, 4), **keywords)


def test_the_backend_refuses_before_it_reads_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(backend, "load_rank", never)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (GIB // 8, (2 + index) * GIB))
    artifact = convert(CHECKPOINT, tmp_path / "demo")
    for share, allowed in ((None, "0.1 GiB"), (0.01, "20.48 MiB")):
        with pytest.raises(CapacityError) as error:
            BACKEND.load(
                artifact, tensor_parallel=1, max_batch=1, max_tokens=64, memory_share=share
            )
        text = str(error.value)
        assert "demo does not fit at tensor_parallel=1: of each GPU weights need 7." in text
        assert f"0.1 GiB of 2.0 GiB free, of which memory_share={share or 0.9:g} allows " in text
        assert f"allows {allowed}: " in text
        assert "nothing would fit here; g" in text


def test_measured_beside_planned() -> None:
    sizes = plan(network(), gpus(1, 80), max_batch=4, max_tokens=160)
    both = sizes.ranks[0].weights + sizes.cache(0, sizes.limits)
    line = sizes.compared(0, sizes.limits, both + GIB // 2)
    assert "weights 12.6 GiB, cache 0.3 GiB, and beside them 0.5 GiB after loading" in line
    fewer = replace(sizes.limits, blocks=sizes.limits.blocks // 2)  # another host had less room
    line = sizes.compared(0, fewer, both)
    assert "cache 0.2 GiB, and beside them 0.2 GiB" in line


def test_stages_have_sizes_of_their_own() -> None:
    whole = plan(network(), gpus(4, 44), 2, max_batch=256)
    sizes = plan(network(), gpus(4, 44), 2, max_batch=256, stages=2)
    assert [sizes.ranks[rank].layers for rank in range(4)] == [16] * 4
    first, last = sizes.ranks[0], sizes.ranks[2]
    assert (sizes.ranks[1], sizes.ranks[3]) == (first, last)
    # The embedding is on the first; the final norm and the head, of the same size, on the last.
    embed = network().weight_bytes("bf16", None, 2) - first.weights
    assert last.weights - first.weights == 4096 * 2 and last.weights == embed
    assert last.workspace > first.workspace  # it draws
    budget = int(0.9 * 44 * GIB)
    assert budget - sizes.layer_block * 16 < taken(sizes, 2) <= budget
    assert taken(sizes, 0) < taken(sizes, 2)
    assert sizes.limits.blocks > 2 * whole.limits.blocks


def test_the_fullest_gpu_decides_for_every_stage() -> None:
    fuller = [*gpus(1, 80), Device("cuda:1", 80 * GIB, 12 * GIB)]
    sizes = plan(network(), fuller, max_batch=256, stages=2)
    assert 11.9 * GIB < taken(sizes, 1) <= 12 * GIB
    text = refusal(network(), [fuller[0], replace(fuller[1], free=4 * GIB)], stages=2)
    assert text.startswith(
        "big does not fit at tensor_parallel=1, pipeline_parallel=2: of each GPU of stage 1 "
        "weights need 6.3 GiB and steps "
    )
    assert "cuda:1 has 4.0 GiB of 80.0 GiB free" in text


def test_a_process_of_torchrun_plans_its_own_rank() -> None:
    """It knows one GPU, and can advise nothing but another format."""
    [gpu] = gpus(1, 8)
    sizes = sizes_on(network(), {3: replace(gpu, total=16 * GIB, free=15 * GIB)}, Grid(1, 4),
                     None, None, None)  # fmt: skip
    assert list(sizes.ranks) == [3] and sizes.ranks[3].layers == 8
    with pytest.raises(CapacityError) as error:
        sizes_on(network(), {0: replace(gpu, free=7 * GIB)}, Grid(1, 2), None, None, None)
    assert str(error.value).endswith("what would fit: quantize='int8'; or quantize='fp8'")


def test_more_stages_are_advised_where_no_degree_fits() -> None:
    odd = network(hidden=4032, heads=63, kv_heads=63, ffn=21 * 512)  # splits over 1, 3, 7, 21
    text = refusal(odd, gpus(2, 13.5))
    assert "pipeline_parallel=2" in text.partition("what would fit: ")[2].split("; or ")
    assert plan(odd, gpus(2, 13.5), stages=2).limits


def workspace(
    spec: ModelSpec, ranks: int = 1, batch: int = 64, tokens: int = 2048, most: int = 2048
) -> int:
    return workspace_bytes(
        spec, widest=0, item_bytes=2, ranks=ranks,
        max_batch=batch, max_tokens=tokens, step_tokens=most,
    )  # fmt: skip


def test_the_workspace_grows_with_what_it_is_for() -> None:
    plain = workspace(LLAMA)
    assert workspace(LLAMA, batch=128) - plain == 64 * 32000 * 96  # three draws of 32 bytes a logit
    assert workspace(LLAMA, tokens=4096) > plain
    windowed = replace(LLAMA, windows=(512,) * 32)
    assert workspace(windowed) - plain == 2048 * 2048 * 6
    alibi = replace(LLAMA, position=Alibi())
    assert workspace(alibi) - plain == 32 * 2048 * 2048 * 6
    for step in (2048, 8192):
        bias = workspace(alibi, tokens=8192, most=step) - workspace(LLAMA, tokens=8192, most=step)
        assert bias == 32 * step * 8192 * 6
    t5 = replace(alibi, position=RelativeBias(buckets=32, max_distance=128), encoder_layers=1)
    assert workspace(t5, tokens=4096) - workspace(LLAMA, tokens=4096) == 32 * 4096 * 4096 * 6
    encoder = replace(LLAMA, position=Learned(), decoder_layers=0, encoder_layers=4)
    assert workspace(encoder) < plain  # nothing is drawn
    quantized = network().workspace_bytes("bf16", "fp8", 2, None, None)
    unquantized = network().workspace_bytes("bf16", None, 2, None, None)
    assert quantized - unquantized == 2 * 4096 * 16000  # half of the head, two bytes each


def test_steps_that_no_row_waits_for_are_large_where_the_cache_loses_nothing() -> None:
    asked = {"max_batch": 64, "max_tokens": 512}
    ample = plan(network(), gpus(2, 80), **asked)
    assert (ample.limits.max_step_tokens, ample.limits.largest_step) == (2048, IDLE_TOKENS)
    least = workspace(LLAMA, tokens=512)
    assert ample.ranks[0].workspace == workspace(LLAMA, tokens=512, most=IDLE_TOKENS) > least
    needed = taken(ample, 0) / GIB / 0.9
    for short in (0.001, (ample.ranks[0].workspace - least) / GIB / 0.9 - 0.001):
        scarce = plan(network(), gpus(2, needed - short), **asked)
        assert scarce.limits.largest_step == 2048 and scarce.ranks[0].workspace == least
        assert scarce.limits.blocks == ample.limits.blocks
    assert plan(network(), gpus(2, needed + 0.001), **asked) == ample


@pytest.mark.parametrize(("degree", "stages"), [(2, 1), (1, 2)])
def test_ranks_have_no_larger_steps(degree: int, stages: int) -> None:
    """One that is short of memory for a step would end them all."""
    sizes = plan(network(), gpus(2, 80), degree, 64, 512, stages=stages)
    assert sizes.limits.largest_step == 2048


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), True, "0.5"])
def test_shares_that_cannot_be(share: Any) -> None:
    with pytest.raises(OptionError, match=r"memory_share is .*, must be None or a number above 0"):
        load("demo", backend="cpu", memory_share=share)


def test_the_hosts_share(tmp_path: Path) -> None:
    with load("demo", backend="cpu", memory_share=0.9, max_batch=2) as model:
        assert model.generate("one")[0].text == "1"
    with pytest.raises(
        CapacityError, match=r"the weights need 0\.01 GiB of memory, but 0\.00 GiB are"
    ):
        load("demo", backend="cpu", memory_share=1e-9)
