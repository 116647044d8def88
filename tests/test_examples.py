"""The walk-through of examples/sagemaker, as a notebook and as a script, against stand-ins: of the
Hub, moto's S3 and SageMaker, and a runtime before a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from lmi_multi.demo import CHECKPOINT
from tests import runtime_server
from tests.checkpoint import hub_server
from tests.moto_server import Moto
from tests.runtime_server import Runtime
from tests.serve.running import Running
from tools.notebook import notebook

EXAMPLE = Path(__file__).parent.parent / "examples" / "sagemaker"
MODEL, BUCKET = "somebody/spoken", "models"


class Endpoints(dict[str, str]):
    """Addresses by what an endpoint's name begins with."""

    def __contains__(self, name: object) -> bool:
        return any(str(name).startswith(own) for own in self)

    def __missing__(self, name: str) -> str:
        return next(address for own, address in self.items() if name.startswith(own))


@pytest.fixture
def runtime(
    aws: Moto, demo_server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Runtime]:
    """Everything that the walk-through talks to, in the environment."""
    aws.client("s3").create_bucket(Bucket=BUCKET)
    with hub_server.serve() as hub, runtime_server.serve() as own:
        files = {file.name: file.read_bytes() for file in CHECKPOINT.iterdir()}
        hub.repos[MODEL] = {"main": "a" * 40, "a" * 40: files}
        own.endpoints = Endpoints({"spoken-": str(demo_server.client.base_url)})
        for name, value in {
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": own.url,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hub"),
            "IPYTHONDIR": str(tmp_path / "ipython"),
            "LMI_MULTI_CACHE": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
            "MODEL": MODEL,
            "BUCKET": BUCKET,
            "IMAGE": "image:1",
            "ROLE": "arn:aws:iam::123456789012:role/endpoints",
            "PROMPT": "twenty two dollars",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield own


def is_clean(aws: Moto) -> bool:
    """Whether nothing is left that costs money."""
    sagemaker = aws.client("sagemaker")
    left = [
        sagemaker.list_endpoints()["Endpoints"],
        sagemaker.list_endpoint_configs()["EndpointConfigs"],
        sagemaker.list_models()["Models"],
        aws.client("s3").list_objects_v2(Bucket=BUCKET).get("Contents", []),
    ]
    return left == [[], [], [], []]


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def test_the_notebook_is_the_script() -> None:
    stored = json.loads((EXAMPLE / "walkthrough.ipynb").read_text())
    assert stored == notebook((EXAMPLE / "walkthrough.py").read_text()), (
        "run: python tools/notebook.py examples/sagemaker/walkthrough.py"
    )


def test_the_notebook(aws: Moto, runtime: Runtime) -> None:
    made = nbformat.read(EXAMPLE / "walkthrough.ipynb", as_version=4)
    NotebookClient(made, timeout=240, startup_timeout=240, kernel_name="python3").execute()
    texts = [printed(cell) for cell in made.cells if cell.cell_type == "code"]
    local, asked, streamed = (texts[index] for index in (3, 7, 8))
    assert local == asked == streamed == "$22\n"
    assert '"InstanceType": "ml.g5.xlarge"' in texts[5]
    assert "made endpoint spoken-" in texts[6] and "removed endpoint spoken-" in texts[9]
    assert is_clean(aws)


def test_the_script_cleans_up_when_a_step_fails(aws: Moto, runtime: Runtime) -> None:
    runtime.endpoints.clear()
    command = [sys.executable, EXAMPLE / "walkthrough.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=240)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"endpoint (spoken-\w{8}): ValidationError: Endpoint \1 of account", last)
    assert "made endpoint spoken-" in done.stdout and "removed endpoint spoken-" in done.stdout
    assert is_clean(aws)


def test_what_was_there_stays(aws: Moto, runtime: Runtime) -> None:
    """Objects and an endpoint that go by the model's own name are somebody's."""
    aws.client("s3").put_object(Bucket=BUCKET, Key="spoken/data.csv", Body=b"1,2\n")
    sagemaker = aws.client("sagemaker")
    sagemaker.create_model(ModelName="spoken", ExecutionRoleArn=os.environ["ROLE"])
    variant = {"VariantName": "v", "ModelName": "spoken", "InstanceType": "ml.g5.xlarge"}
    variant |= {"InitialInstanceCount": 1}
    sagemaker.create_endpoint_config(EndpointConfigName="spoken", ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName="spoken", EndpointConfigName="spoken")
    command = [sys.executable, EXAMPLE / "walkthrough.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=240)
    assert done.returncode == 0, done.stderr
    [found] = aws.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]
    assert found["Key"] == "spoken/data.csv"
    assert [e["EndpointName"] for e in sagemaker.list_endpoints()["Endpoints"]] == ["spoken"]
