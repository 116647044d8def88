"""What ranks that torchrun has started agree on: each has planned with its own device's memory."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing import Pipe

import pytest
from torch._C._distributed_c10d import HashStore

from lmi_multi.backends.base import Limits
from lmi_multi.parallel import torchrun

AMPLE = Limits(2, 100, 64, blocks=32, block_size=8, max_idle_tokens=256)


@pytest.mark.parametrize("scarce", [0, 1])
@pytest.mark.parametrize("name", ["blocks", "max_idle_tokens"])
def test_what_one_has_no_room_for_none_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str, scarce: int
) -> None:
    less = replace(AMPLE, **{name: getattr(AMPLE, name) // 2})
    own, other = (less, AMPLE) if scarce == 0 else (AMPLE, less)
    ours, theirs = Pipe()
    hello = torchrun._Hello(1, "there", "weights", other)
    monkeypatch.setattr(torchrun, "_joined", False)
    monkeypatch.setattr(torchrun, "rendezvous", lambda *_, **__: iter([(HashStore(), 0, 2)]))
    monkeypatch.setattr(torchrun, "_gather", lambda *_: {ours: hello})
    monkeypatch.setattr(torchrun, "TorchrunRanks", lambda *_: None)
    job = torchrun.Job(0, 2, 0, "an address")
    _, agreed = torchrun.join(job, 0, lambda *_: pytest.fail("built"), own, "gloo", "weights")
    assert agreed == theirs.recv() == less
    for connection in (ours, theirs):
        connection.close()
