"""The OpenAPI page as a promise: whatever it allows is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import positive_data_acceptance

from lmi_multi.serve.app import Application
from lmi_multi.serve.settings import ServeSettings
from tests.serve.running import Running, serving

described = schemathesis.openapi.from_dict(
    Application(ServeSettings(model="demo"), "demo", read=lambda _: ServeSettings()).app.openapi()
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    # Few tokens, as examples ask for as many as there can be.
    place = tmp_path_factory.mktemp("description")
    with serving(place, "demo", "--max-tokens", "48") as running:
        running.wait_ready()
        yield running
        assert running.gauge("lmi_engine_restarts") == 0
        assert "Traceback" not in running.log.read_text()


@pytest.mark.filterwarnings("ignore:Skipped test cases")  # it makes no JSON lines
@described.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case: Case, server: Running) -> None:
    # The page cannot say all that a request must keep to: a model's longest prompt, its
    # vocabulary, options that exclude each other.
    case.call_and_validate(
        base_url=str(server.client.base_url),
        excluded_checks=[positive_data_acceptance],
        timeout=60,
    )
