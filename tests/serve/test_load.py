"""Many clients at once: every answer comes, whole, and to the one that asked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import lmi_multi
from benchmarks.load import load
from lmi_multi.demo.spoken import pairs
from tests.serve.running import serving

CLIENTS, SECONDS = 64, 4.0


def test_no_answer_is_lost_or_mixed(tmp_path: Path) -> None:
    prompts = [spoken for spoken, _ in pairs(2, 100)]
    with lmi_multi.load("demo", backend="cpu") as model:
        expected = model.generate(prompts, max_new_tokens=40)
    with serving(tmp_path, "demo", "--max-batch", "16") as server:
        server.wait_ready()
        url = str(server.client.base_url)
        found = asyncio.run(load(url, prompts, CLIENTS, SECONDS, max_new_tokens=40))
        assert len(found) >= CLIENTS and server.gauge("lmi_in_flight") == 0
        assert server.gauge('lmi_requests_total{outcome="done"}') == len(found)
        assert server.gauge("lmi_cache_blocks") == 0
    for answered in found:
        assert answered.error == ""
        assert answered.text == expected[answered.prompt].text
        # A line for each token, none lost, none twice.
        assert len(answered.arrivals) == len(expected[answered.prompt].token_ids)
