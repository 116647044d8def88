"""What a container is given, as a black box: a folder of its own, variables, the post's file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmi_multi import demo
from lmi_multi.checkpoint.convert import convert
from tests.checkpoint.s3_server import Door
from tests.serve.running import reserved_port, serving
from tests.tiny_models import checkpoint

ALONE = ["unshare", "--mount", "--propagation", "private"]


def can_mount() -> bool:
    """Whether a process may have mounts of its own."""
    command = [*ALONE, "mount", "-t", "tmpfs", "none", "/opt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_mount(), reason="no mount namespaces here")
@pytest.mark.skipif(sys.prefix.startswith("/opt"), reason="Python itself is in /opt")
def test_the_model_is_where_sagemaker_puts_it_and_read_only(tmp_path: Path) -> None:
    """`serve`, and nothing else: the model is in /opt/ml/model, with a file of its own."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "serving.properties").write_text("option.max_rolling_batch_size=3\n")
    script = tmp_path / "container"
    script.write_text(
        "#!/bin/sh -e\n"
        "mount -t tmpfs none /opt\n"
        "mkdir -p /opt/ml/model\n"
        f"cp -r {demo.CHECKPOINT}/. {own}/. /opt/ml/model\n"
        "mount -o remount,ro /opt\n"
        "! touch /opt/ml/model/x 2>/dev/null\n"
        f'exec {sys.executable} -m lmi_multi "$@"\n'
    )
    script.chmod(0o755)
    environment = {"LMI_MULTI_CACHE": str(tmp_path / "cache"), "OPTION_BACKEND": "cpu"}
    with (
        reserved_port() as port,
        serving(
            tmp_path,
            None,
            run=[*ALONE, str(script)],
            SAGEMAKER_BIND_TO_PORT=str(port),
            **environment,
        ) as server,
    ):
        server.wait_ready()
        assert server.post("/invocations", {"inputs": "ten"}).json() == {"generated_text": "10"}
        assert server.client.get("/execution-parameters").json()["MaxConcurrentTransforms"] == 3
        assert "serving /opt/ml/model on" in server.log.read_text()


def test_the_post_s_file_works_as_it_stands(s3: Door, tmp_path: Path) -> None:
    """On four ranks, from S3: what a file of 2023 says, and no more."""
    convert(demo.CHECKPOINT, tmp_path / "artifact", tensor_parallel=4)
    url = s3.put("flan-t5", tmp_path / "artifact")
    properties = tmp_path / "serving.properties"
    properties.write_text(
        "engine=FasterTransformer\n"
        "option.tensor_parallel_degree=4\n"
        f"option.s3url={url}/\n"
        "option.entryPoint=djl_python.fastertransformer\n"
    )
    with serving(tmp_path, f"--properties={properties}", OPTION_BACKEND="cpu") as server:
        server.wait_ready()
        assert server.post("/invocations", {"inputs": "ten"}).json() == {"generated_text": "10"}
        processes = server.engine().children(recursive=True)
        assert sum("multiprocessing.spawn" in " ".join(p.cmdline()) for p in processes) == 4


def test_an_option_that_nobody_knows(tmp_path: Path) -> None:
    properties = tmp_path / "serving.properties"
    properties.write_text("option.model_id=demo\noption.tensor_paralel_degree=4\n")
    command = [sys.executable, "-m", "lmi_multi", "serve", "--properties", str(properties)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert "'option.tensor_paralel_degree'; did you mean 'option.tensor_parallel_degree'?" in line


def test_the_largest_body_by_sagemaker_s_other_variable(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", SAGEMAKER_MAX_REQUEST_SIZE="2048") as server:
        server.until(lambda: server.ping() != 0)
        assert server.client.get("/execution-parameters").json()["MaxPayloadInMB"] == 1
        for length, status in ((2049, 413), (2048, 400)):
            server.wait_ready()
            answer = server.client.post("/invocations", content=b" " * length)
            assert answer.status_code == status


@pytest.mark.parametrize(
    ("megabytes", "rows", "at_once"), [("6", "64", 16), ("6", "3", 3), ("1024", "64", 1)]
)
def test_batch_transform_sends_no_more_than_aws_lets_it(
    megabytes: str, rows: str, at_once: int, tmp_path: Path
) -> None:
    variables = {"SAGEMAKER_MAX_PAYLOAD_IN_MB": megabytes, "OPTION_MAX_ROLLING_BATCH_SIZE": rows}
    with serving(tmp_path, "demo", OPTION_BACKEND="cpu", **variables) as server:
        server.wait_ready()
        found = server.client.get("/execution-parameters").json()
    assert found["MaxConcurrentTransforms"] == at_once
    assert at_once * found["MaxPayloadInMB"] <= 100


def test_a_model_that_is_not_loaded_in_time(tmp_path: Path) -> None:
    script = tmp_path / "model.py"
    script.write_text("import time\ndef handle(inputs):\n    time.sleep(1000)\n")
    options = ("--entry-point", str(script))
    with serving(tmp_path, "demo", *options, SAGEMAKER_STARTUP_TIMEOUT="0.5") as server:
        assert server.process.wait(120) == 1
        assert "it was not ready within 0.5 s" in server.log.read_text()


def test_the_prompt_before_the_answer(tmp_path: Path, checkpoints: Path) -> None:
    folder = checkpoint(checkpoints, "gpt2", tokenizer=True)
    with serving(tmp_path, str(folder)) as server:
        server.wait_ready()
        parameters = {"max_new_tokens": 4, "return_full_text": True}
        body = {"inputs": "abc", "parameters": parameters}
        whole = server.post("/invocations", body).json()["generated_text"]
        parameters["return_full_text"] = False
        assert whole == "abc" + server.post("/invocations", body).json()["generated_text"]
