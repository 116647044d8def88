"""What every format costs in perplexity, on the CPU and, where there is one, on a GPU.

The bounds are two to four times what was measured: `benchmarks/results/cpu-perplexity.md`.
"""

from __future__ import annotations

import pytest

from benchmarks.perplexity import GAP, Text, compare, demo, with_outliers
from lmi_multi import backends

FORMATS = (("fp32", None), ("bf16", None), ("bf16", "int8"), ("bf16", "fp8"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _available(device: str) -> None:
    state = backends.probe(device)
    if not state.ok:
        pytest.skip(f"{device}: {state.reason}")


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Text:
    peak, text = with_outliers(tmp_path_factory.mktemp("outliers"), 8)
    assert peak == pytest.approx(1e5, rel=0.01)  # of an FFN's activations
    return text


def costs(name: str, text: Text, device: str) -> dict[str, float]:
    """The relative change of perplexity by format."""
    found = {}
    for entry in compare({name: text}, device, FORMATS):
        assert entry.relative is not None, entry
        found[entry.quantize or entry.dtype] = entry.relative
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_the_demo_model_with_gaps_in_its_prompts(device: str) -> None:
    found = costs("demo", demo(20, GAP), device)
    for form, most in (("bf16", 0.005), ("int8", 0.01), ("fp8", 0.02)):
        assert abs(found[form]) <= most, found


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_with_activations_near_1e5(device: str, outliers: Text) -> None:
    found = costs("outliers", outliers, device)
    for form, most in (("bf16", 0.01), ("int8", 0.06), ("fp8", 0.15)):
        assert abs(found[form]) <= most, found
