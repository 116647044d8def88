"""What is written for transformers-neuronx, loaded by its own sources.

`make test-neuron-sources TNX=CHECKOUT` runs it, with a checkout of the public repository, in a
process of its own, whose packages for Neuron are stand-ins. Its networks are built of HLO by closed
parts, so nothing of them runs; its classes, settings and weights are real.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lmi_multi.backends.neuron.transformers_neuronx import plan_rows, settings
from lmi_multi.backends.neuron.transformers_neuronx_export import exported
from lmi_multi.backends.neuron.transformers_neuronx_ports import find_port
from safetensors import safe_open

from tests import nxd_closed_parts as closed
from tests.neuron_libraries import parameters, real, signatures
from tests.test_neuron_transformers_neuronx import RUN, artifact

SOURCES = os.environ.get("LMI_MULTI_TNX_SOURCES")
if not SOURCES:
    pytest.skip(
        "needs transformers-neuronx's sources: see `make test-neuron-sources`",
        allow_module_level=True,
    )
closed.install_finder(Path(SOURCES) / "src")
LIBRARY = "transformers_neuronx"


@pytest.mark.parametrize("name", signatures(LIBRARY))
def test_signatures_are_those_of_the_sources(name: str) -> None:
    theirs = real(LIBRARY, name)
    assert Path(sys.modules[LIBRARY].__file__ or "").is_relative_to(Path(SOURCES or "").resolve())
    assert parameters(theirs) == parameters(signatures(LIBRARY)[name])


@pytest.mark.parametrize("family", RUN)
def test_every_weight_is_found(family: str, checkpoints: Path) -> None:
    if family == "gptneox" and transformers.__version__.startswith("5."):
        pytest.skip("transformers 5 has no rotary_pct, which the library reads")
    import transformers_neuronx as library

    source = artifact(family, checkpoints)
    port = find_port(source)
    folder = exported(source, port)
    given: dict[str, Any] = settings(library, port, plan_rows(source, port, 2, 2**30, None, 64))
    kept = getattr(library, port.name).from_pretrained(str(folder), **given, tp_degree=2, amp="f32")
    network = getattr(kept, "chkpt_model", kept)
    places = {name: p for name, p in network.named_parameters() if hasattr(p, "_file_path")}
    assert set(dict(network.named_parameters())) - set(places) <= {"embed_out.bias"}
    for name, parameter in places.items():
        with safe_open(parameter._file_path, "pt") as file:
            assert file.get_tensor(parameter._global_key).dtype == torch.float32, name
    files = folder.glob("*.safetensors")
    written = {key for path in files for key in safe_open(path, "pt").keys()}  # noqa: SIM118
    assert {p._global_key for p in places.values()} == written
