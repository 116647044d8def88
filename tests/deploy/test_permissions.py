"""The policy in the documentation beside what the commands call."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmi_multi.cli.main import run
from lmi_multi.deploy import aws as clients
from lmi_multi.deploy import endpoint
from tests.deploy.test_endpoint import ARGS
from tests.moto_server import Moto

DOCUMENT = Path(__file__).parents[2] / "docs" / "deploying.md"


def policy() -> dict[str, Any]:
    [found] = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return {statement["Sid"]: statement for statement in json.loads(found)["Statement"]}


def test_the_policy_allows_what_is_called_and_no_more(
    aws: Moto, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()

    def note(model: Any, **_: Any) -> None:
        called.add(f"{model.service_model.service_name}:{model.name}")

    def watched(service: str) -> Any:
        client = clients.make_client(service)
        client.meta.events.register("before-call", note)
        return client

    monkeypatch.setattr(endpoint, "make_client", watched)
    assert run([*ARGS, "--max-instances", "2"]) == 0
    assert run(["undeploy", "demo"]) == 0
    statements = policy()
    assert called == {*statements["Endpoints"]["Action"], *statements["Scaling"]["Action"]}
    assert statements["Role"]["Action"] == "iam:PassRole"
    assert not [a for s in statements.values() for a in s["Action"] if a.endswith("*")]
