"""The OpenAPI page as a promise: whatever it allows is answered as it says. There are two of them:
of one model, and of several that come and go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import positive_data_acceptance

from lmi_multi import demo
from lmi_multi.serve.app import Application
from lmi_multi.serve.settings import ServeSettings
from tests.serve.running import Running, serving

MODEL = "numbers"


def page(settings: ServeSettings) -> Any:
    """What a server of these settings says of itself."""
    application = Application(settings, "demo", read=lambda _: ServeSettings())
    return schemathesis.openapi.from_dict(application.app.openapi())


described = page(ServeSettings(model="demo"))
of_models = page(ServeSettings(multi_model=True))
judged = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
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
@judged
def test_answers_are_as_described(case: Case, server: Running) -> None:
    validate(case, server)


def validate(case: Case, server: Running) -> None:
    # The page cannot say all that a request must keep to: a model's longest prompt, its
    # vocabulary, options that exclude each other, which models there are.
    case.call_and_validate(
        base_url=str(server.client.base_url),
        excluded_checks=[positive_data_acceptance],
        timeout=60,
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("several")
    shutil.copytree(demo.CHECKPOINT, place / MODEL)
    options = ("--multi-model", "--models-root", str(place), "--backend=cpu", "--max-tokens=48")
    with serving(place, *options) as running:
        running.wait_ready()
        yield running
        assert "Traceback" not in running.log.read_text()


@pytest.fixture
def loaded(several: Running) -> Running:
    """The server with a model, whatever became of it before."""
    folder = Path(several.log.parent / MODEL)
    answer = several.post("/models", {"model_name": MODEL, "url": str(folder)})
    assert answer.status_code in (200, 409)
    return several


@pytest.mark.filterwarnings("ignore:Skipped test cases")
@of_models.parametrize()
@judged
def test_answers_about_models_are_as_described(case: Case, loaded: Running) -> None:
    # Every other case is about the model that there is: of its own accord it would never come up.
    given = case.path_parameters.get("name")
    if given is not None and len(given) % 2:
        case.path_parameters["name"] = MODEL
    if isinstance(case.body, dict) and len(str(case.body.get("url"))) % 2:
        case.body["url"] = str(loaded.log.parent / MODEL)
        case.body["model_name"] = MODEL
    validate(case, loaded)
