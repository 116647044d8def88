"""What /metrics says after work whose figures are known."""

from __future__ import annotations

from pathlib import Path

from tests.serve.running import LONG, ROOM, serving


def test_every_figure(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--max-batch=1", "--max-queue=2", ROOM) as server:
        server.wait_ready()
        exactly = {"max_new_tokens": 7, "min_new_tokens": 7, "ignore_eos": True}
        for _ in range(3):
            answer = server.post("/invocations", {"inputs": "ten", "parameters": exactly})
            assert answer.status_code == 200
        usage = server.post("/v1/completions", {"prompt": "ten", "max_tokens": 1}).json()["usage"]
        expected = {
            'lmi_requests_total{outcome="done"}': 4,
            'lmi_requests_total{outcome="failed"}': 0,
            "lmi_prompt_tokens_total": 4 * usage["prompt_tokens"],
            "lmi_generated_tokens_total": 22,
            "lmi_time_to_first_token_seconds_count": 4,
            "lmi_queue_seconds_count": 4,
            "lmi_request_seconds_count": 4,
            "lmi_inter_token_seconds_count": 3,  # a mean a whole answer; one token has no gap
            "lmi_numerical_errors_total": 0,
            "lmi_shed_requests_total": 0,
            "lmi_engine_ready": 1,
        }
        assert {name: server.gauge(name) for name in expected} == expected
        assert server.gauge("lmi_time_to_first_token_seconds_sum") > 0
        with server.asking("/invocations", LONG), server.asking("/invocations", LONG):
            server.until(lambda: server.gauge("lmi_queue") == 1)
            assert server.gauge("lmi_in_flight") == 2 and server.gauge("lmi_batch_rows") == 1
            assert server.gauge("lmi_cache_blocks") > 0
            assert server.post("/invocations", {"inputs": "ten"}).status_code == 503
            assert server.gauge("lmi_shed_requests_total") == 1
        server.until(lambda: server.gauge('lmi_requests_total{outcome="aborted"}') == 2)
        # The engine lets go of one after the other, and tells of each.
        for name in ("lmi_queue", "lmi_batch_rows", "lmi_cache_blocks"):
            server.until(lambda name=name: server.gauge(name) == 0)
