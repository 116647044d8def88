"""Under torchrun a model of a process's own, on the second of two GPUs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import lmi_multi
from lmi_multi import backends
from tests import tiny_models
from tests.test_cuda_graphs import prompts
from tests.test_cuda_own_gpu import TOLD


@pytest.mark.cuda
def test_answers_of_the_second_gpu(monkeypatch: pytest.MonkeyPatch, checkpoints: Path) -> None:
    """Asked from a thread whose current GPU is the first."""
    state = backends.probe("cuda")
    if not state.ok or len(state.devices) < 2:
        pytest.skip(f"cuda: 2 GPUs wanted, {len(state.devices)} here; {state.reason}")
    folder = tiny_models.checkpoint(checkpoints, "llama")
    own, answers = prompts(5, 3), []
    for number in ("0", "1"):
        for name, value in (TOLD | {"MASTER_PORT": "1", "LOCAL_RANK": number}).items():
            monkeypatch.setenv(name, value)
        with lmi_multi.load(folder, backend="cuda", dtype="fp32", max_batch=4) as model:
            assert model.device.startswith(f"cuda:{number}")

            def ask(model: lmi_multi.Model = model) -> None:
                torch.cuda.set_device(0)
                for more in ({}, {"do_sample": True, "seed": 2}, {"num_beams": 2}):
                    found = model.generate(own, max_new_tokens=20, **more)
                    answers.append([c.token_ids for c in found])

            asking = threading.Thread(target=ask)
            asking.start()
            asking.join(120)
    assert len(answers) == 6 and answers[:3] == answers[3:]
