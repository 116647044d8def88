"""The containers, as far as that goes without building them: their files are linted and read, and
what they start is started, here."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from dockerfile_parse import DockerfileParser

from tests.serve.running import Running

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "containers").glob("Dockerfile.*"))
BIN = Path(sys.executable).parent
UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def instructions(file: Path, name: str) -> list[str]:
    """The values of all instructions of that name, continuations joined."""
    parser = DockerfileParser(fileobj=file.open("rb"), env_replace=False)
    return [entry["value"] for entry in parser.structure if entry["instruction"] == name]


def environment(file: Path) -> dict[str, str]:
    """The variables of the last stage."""
    pairs = shlex.split(instructions(file, "ENV")[-1])
    return dict(pair.split("=", 1) for pair in pairs)


def test_both_are_there() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cuda", "Dockerfile.neuron"]


def lint(text: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "hadolint", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix)
def test_lint(file: Path) -> None:
    done = lint(file.read_text())
    assert (done.returncode, done.stdout) == (0, "")
    shell_form = re.sub(r"ENTRYPOINT .*", "ENTRYPOINT lmi-multi", file.read_text())
    assert "DL3025" in lint(shell_form).stdout


def arguments(file: Path) -> dict[str, str]:
    """The arguments that have a default."""
    pairs = [value.partition("=") for value in instructions(file, "ARG")]
    return {name: value.strip('"') for name, equals, value in pairs if equals}


def bases(file: Path) -> list[str]:
    """The stages' images, with the defaults filled in where there are some."""
    found = [base.removesuffix(" AS build") for base in instructions(file, "FROM")]
    return [
        re.sub(r"\$\{(\w+)\}", lambda name: arguments(file).get(name[1], name[0]), base)
        for base in found
    ]


def checked(file: Path, **given: str) -> int:
    """The exit code of the build's own look at its bases."""
    [check] = [run for run in instructions(file, "RUN") if "sha256" in run]
    environ = os.environ | arguments(file) | given
    command = ["bash", "-euo", "pipefail", "-c", check]
    return subprocess.run(command, env=environ, capture_output=True).returncode


def test_bases_are_pinned() -> None:
    cuda, neuron = FILES
    build, runtime = bases(cuda)
    # By digest, in the registry that needs no name, and of one release.
    for base in (build, runtime):
        assert re.fullmatch(r"([a-z]+/)?[a-z]+:[\w.-]+@sha256:[0-9a-f]{64}", base)
        assert "ubuntu24.04" in base.replace(":", "")
    assert "-devel-" in build
    assert set(bases(neuron)) == {
        "${REGISTRY}/pytorch-inference-neuronx:2.9.0-neuronx-py312-sdk2.30.0-ubuntu24.04"
    }
    assert "REGISTRY" in instructions(neuron, "ARG"), "without a default"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix)
def test_other_bases_must_be_pinned_too(file: Path) -> None:
    names = [name for name in arguments(file) if name.endswith("BASE")]
    assert names and checked(file) == 0
    for name in names:
        assert checked(file, **{name: f"ubuntu@sha256:{'0' * 64}"}) == 0
        for moving in ("ubuntu:24.04", "ubuntu", "", "pytorch-inference-neuronx:latest"):
            assert checked(file, **{name: moving}) == 1


def test_the_runtime_s_user_is_its_own() -> None:
    """Ubuntu has one with 1000."""
    for file in FILES:
        assert "useradd --create-home --uid 10001 lmi" in " ".join(instructions(file, "RUN"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix)
def test_no_driver_and_no_secret(file: Path) -> None:
    installed = " ".join(instructions(file, "RUN"))
    assert not re.search(r"nvidia|libcuda|cuda-drivers|neuronx-dkms|curl|wget|chmod 777", installed)
    assert not re.search(r"(?i)token|secret|password|api_key", " ".join(environment(file)))
    assert "ADD" not in {
        e["instruction"] for e in DockerfileParser(fileobj=file.open("rb")).structure
    }
    assert instructions(file, "USER") == ["${RUN_AS}"]
    assert "RUN_AS=root" in instructions(file, "ARG")
    assert "useradd" in installed


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix)
def test_what_is_copied_is_in_the_context(file: Path) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = [value.split() for value in instructions(file, "COPY") if "--from" not in value]
    assert copied
    for *sources, _ in copied:
        for source in sources:
            assert (ROOT / source).exists() and source in let_in


def test_the_context_holds_nothing_else() -> None:
    rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r[:1] not in "#!"]
    assert rules[0] == "*"
    assert any(fnmatch("backends/cuda/_kernels.so", rule) for rule in rules[1:])


# What they start


def has_namespaces() -> bool:
    """Whether a process may be the first one of its own."""
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


START = ("ENTRYPOINT", "CMD", "HEALTHCHECK", "EXPOSE", "LABEL")


def test_both_start_alike() -> None:
    cuda, neuron = ([instructions(file, name) for name in START] for file in FILES)
    assert cuda == neuron
    assert environment(FILES[1]).items() <= environment(FILES[0]).items()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[Running, dict[str, str]]]:
    """`docker run IMAGE serve` as SageMaker does it, without the image: the entry point with the
    image's variables, as the first process of its own where that is allowed."""
    file = FILES[0]
    [entry] = instructions(file, "ENTRYPOINT")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {
        **environment(file),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LMI_MULTI_CACHE": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "OPTION_HOST": "127.0.0.1",  # and not 0.0.0.0, which only a container may bind
        "OPTION_MODEL_ID": "demo",
        "SAGEMAKER_BIND_TO_PORT": port,
    }
    command = [*(UNSHARE if has_namespaces() else []), *json.loads(entry), "serve"]
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        subprocess.Popen(
            command, stdout=output, stderr=output, text=True, env=settings, cwd=tmp_path
        ) as process,
    ):
        try:
            yield Running(process, client, log), settings
        finally:
            process.kill()


def test_the_entry_point(started: tuple[Running, dict[str, str]]) -> None:
    server, settings = started
    file = FILES[0]
    assert json.loads(instructions(file, "CMD")[-1]) == ["serve"]
    [check] = instructions(file, "HEALTHCHECK")
    _, _, command = check.partition("CMD ")
    python, script = json.loads(command)
    assert (python, Path(script).name) == ("python", "ping.py")

    def healthy(**ports: str) -> int:
        own = [sys.executable, ROOT / "containers" / "ping.py"]
        return subprocess.run(own, env=settings | ports, capture_output=True).returncode

    assert healthy() == 1
    server.wait_ready()
    assert healthy() == 0
    assert healthy(http_proxy="http://127.0.0.1:1") == 0
    port = settings["SAGEMAKER_BIND_TO_PORT"]
    assert healthy(OPTION_PORT=port, SAGEMAKER_BIND_TO_PORT="1") == 0  # as the server has it
    assert healthy(OPTION_PORT="1") == 1
    assert server.post("/invocations", {"inputs": "ten"}).json() == {"generated_text": "10"}
    # The server itself, which unshare, if it is there, has started.
    parent = psutil.Process(server.process.pid)
    own = next((c for c in parent.children() if parent.name() == "unshare"), parent)
    own.send_signal(signal.SIGTERM)
    assert server.process.wait(120) == 0
    assert not own.is_running()


@pytest.mark.skipif(not has_namespaces(), reason="no process namespaces here")
def test_a_container_that_is_stopped_while_it_starts(tmp_path: Path) -> None:
    command = [*UNSHARE, BIN / "lmi-multi", "serve", "demo", "--port", "0"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            own = wait_for(lambda: next(iter(psutil.Process(process.pid).children()), None))
            wait_for(lambda: catches(own.pid, signal.SIGTERM))
            own.send_signal(signal.SIGTERM)
            assert process.wait(120) == 143
        finally:
            process.kill()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    [mask] = re.findall(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found
