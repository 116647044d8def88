"""Which runtime a host gets, what `doctor` says of it, and a model loaded through one.

Hosts and installed packages are written down here; the library is its stand-in.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lmi_multi.backends.neuron import BACKEND, backend, devices, environment, runtimes, sdk
from lmi_multi.backends.neuron.devices import Core, Host

from lmi_multi import load
from lmi_multi.cli.main import run
from lmi_multi.errors import BackendError, CapacityError, OptionError
from tests.transformers_neuronx_stand_in import artifact, stand_in

GIB = 2**30
NXD = {"neuronx-cc": "2.24.1", "torch-neuronx": "2.9.0", "neuronx-distributed": "0.18.1"}
TNX = {"neuronx-cc": "2.20.1", "torch-neuronx": "2.7.0", "transformers-neuronx": "0.13.1"}
INF2 = Host(("/dev/neuron0",), "inf2.xlarge", [Core(i, 0, 16 * GIB) for i in range(2)])
TAKEN = Host(("/dev/neuron0",), "inf2.xlarge", [Core(i, 0, 16 * GIB, 4711) for i in range(2)])
BARE = Host((), "inf2.xlarge")
UNLISTED = Host(("/dev/neuron0",), "inf2.xlarge", (), "no such file: neuron-ls")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this machine another one, with no variables of Neuron but those that are given."""

    def become(host: Host, packages: dict[str, str], **given: str) -> None:
        kept = {name: value for name, value in os.environ.items() if "NEURON" not in name}
        monkeypatch.setattr(os, "environ", kept | given)
        monkeypatch.setattr(devices, "look", lambda: host)
        monkeypatch.setattr(devices, "instance_type", lambda: host.instance)
        monkeypatch.setattr(sdk, "installed", lambda: sdk.Sdk(packages))

    return become


@pytest.mark.parametrize(
    ("host", "packages", "asked", "reason", "remedy"),
    [
        (BARE, NXD, "", "inf2.xlarge has NeuronCores, but there is no /dev/neuron0", "modprobe"),
        (UNLISTED, NXD, "", "1 Neuron device, but no list of cores: no such", "-tools"),
        (TAKEN, NXD, "", "0 of 2 are free; all are held by process 4711", "end that proc"),
        (INF2, {}, "", "the Neuron SDK is not installed", "install neuronx-cc==2.26.*"),
        (INF2, NXD, "transformers_neuronx", "SDK 2.29 is too new for transformers_n", "SDK 2.25"),
        (INF2, TNX, "nxd", "SDK 2.25 is too old for nxd (SDK 2.28 to 2.31)", "torch-neuronx==2.9"),
        (INF2, NXD, "jax", "must be one of nxd, emulator, transformers_neuronx", "unset LMI_M"),
        (Host(), NXD, "nxd", "no Neuron device (/dev/neuron0) here", "backend='cpu'"),
    ],
)
def test_what_stands_in_the_way_and_what_helps(
    host: Host,
    packages: dict[str, str],
    asked: str,
    reason: str,
    remedy: str,
    machine: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine(host, packages, **({runtimes.VARIABLE: asked} if asked else {}))
    state = BACKEND.probe()
    assert not state.ok
    assert reason in state.reason
    assert remedy in state.remedy
    run(["doctor", "--json"])
    assert remedy in capsys.readouterr().out


@pytest.mark.parametrize("cores", ["30-31", "0-2"])
def test_named_cores_must_exist(cores: str, machine: Any) -> None:
    machine(INF2, NXD, NEURON_RT_VISIBLE_CORES=cores)
    refusal = f"NEURON_RT_VISIBLE_CORES is '{cores}', but this host's NeuronCores are 0-1"
    state = BACKEND.probe()
    assert (state.ok, state.reason) == (False, refusal)
    with pytest.raises(BackendError, match=refusal):
        environment.take_cores(1)


def test_named_cores_count_once(machine: Any) -> None:
    machine(INF2, NXD, NEURON_RT_VISIBLE_CORES="0,0")
    with pytest.raises(BackendError, match=r"is '0,0', but tensor_parallel is 2; name 2 of 0-1"):
        environment.take_cores(2)


def test_another_process_on_the_device_of_a_named_core(machine: Any) -> None:
    """The tool tells who holds a device, not which of its cores."""
    machine(TAKEN, NXD, NEURON_RT_VISIBLE_CORES="1")
    state = BACKEND.probe()
    assert state.ok
    assert "2 NeuronCores of 16 GiB, 1 named by NEURON_RT_VISIBLE_CORES" in state.reason
    environment.take_cores(1)
    machine(UNLISTED, NXD, NEURON_RT_VISIBLE_CORES="1")
    assert not BACKEND.probe().ok


def test_cores_are_taken_once_a_process(machine: Any) -> None:
    machine(INF2, NXD)
    environment.take_cores(1)
    assert os.environ["NEURON_RT_VISIBLE_CORES"] == "0"
    environment.take_cores(1)
    assert BACKEND.probe().ok
    with pytest.raises(
        BackendError, match=r"this process has taken the NeuronCores 0 for an earli"
    ):
        environment.take_cores(2)


def test_a_child_does_not_take_its_parents_cores_for_the_users_choice(machine: Any) -> None:
    """It inherits the variables, under another process id."""
    four = Host(
        INF2.devices,
        "trn1.32xlarge",
        [Core(i, i // 2, GIB, 4711 if i < 2 else None) for i in range(4)],
    )
    parent = {environment.CORES: "0-1", environment.COUNT: "2", environment.TAKEN: "4711 0-1"}
    machine(four, NXD, **parent)
    assert "2 free" in BACKEND.probe().reason
    environment.take_cores(1)
    assert os.environ[environment.CORES] == "2"
    assert os.environ[environment.COUNT] == "1"
    machine(TAKEN, NXD, **parent)
    with pytest.raises(BackendError, match="0 of 2 are free; all are held by process 4711"):
        environment.take_cores(1)
    # Another value is one that the user has set for the child.
    machine(four, NXD, **{**parent, environment.CORES: "1"})
    assert "1 named by NEURON_RT_VISIBLE_CORES" in BACKEND.probe().reason


def test_the_environment_is_set_before_the_runtime_starts(machine: Any, tmp_path: Path) -> None:
    machine(INF2, NXD, LMI_MULTI_CACHE=str(tmp_path))
    environment.take_cores(2)
    assert {name: value for name, value in os.environ.items() if name.startswith("NEURON_")} == {
        "NEURON_RT_VISIBLE_CORES": "0-1",
        "NEURON_RT_NUM_CORES": "2",
        "NEURON_CC_FLAGS": environment.COMPILER_FLAGS,
        "NEURON_COMPILE_CACHE_URL": f"{tmp_path}/neuronx-cc",
    }


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({"LMI_MULTI_NEURON_CACHE": "/graphs"}, "/graphs/neuronx-cc"),
        ({"LMI_MULTI_NEURON_CACHE": "s3://bucket/graphs"}, "s3://bucket/graphs/neuronx-cc"),
        ({"LMI_MULTI_NEURON_CACHE": "/graphs", "NEURON_COMPILE_CACHE_URL": "/own"}, "/own"),
    ],
)
def test_where_the_sdk_keeps_what_it_compiles(
    given: dict[str, str], url: str, machine: Any
) -> None:
    machine(INF2, NXD, **given)
    environment.compile_for("inf2.xlarge")
    assert os.environ["NEURON_COMPILE_CACHE_URL"] == url
    assert os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] == "inf2"


@pytest.mark.parametrize(
    ("packages", "asked", "runtime"),
    [
        (NXD, "", "nxd on SDK 2.29"),
        (TNX, "", "transformers_neuronx on SDK 2.25"),
        (NXD, "nxd", "nxd"),
    ],
)
def test_the_runtime_follows_the_sdk(
    packages: dict[str, str], asked: str, runtime: str, machine: Any
) -> None:
    machine(INF2, packages, **({runtimes.VARIABLE: asked} if asked else {}))
    state = BACKEND.probe()
    assert state.ok
    cores = "inf2.xlarge: 2 NeuronCores of 16 GiB, 2 free, tensor_parallel 1, 2"
    assert state.reason.startswith(f"{cores}, by {runtime}")
    assert state.devices == ("/dev/neuron0",)
    assert runtime.startswith(runtimes.choose())


def test_instance_types_that_are_not_known(machine: Any) -> None:
    machine(Host(("/dev/neuron0",), None, INF2.cores), NXD)
    state = BACKEND.probe()
    assert state.ok
    assert "of no known instance type: set LMI_MULTI_NEURON_INSTANCE" in state.reason
    machine(INF2, NXD, **{environment.INSTANCE: "inf2.9xlarge"})
    assert BACKEND.probe().reason.startswith("instance is 'inf2.9xlarge'; did you mean")


def test_the_emulator_where_it_is_asked_for(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(Host(), {}, **{runtimes.VARIABLE: "emulator"})
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    assert BACKEND.probe().reason == "the emulator needs torch_xla, jax, jaxlib"
    with pytest.raises(BackendError, match=r"the emulator needs .*; run `make test-neuron`"):
        runtimes.choose()
    monkeypatch.setattr(runtimes, "find_spec", lambda name: name)
    assert BACKEND.probe().ok
    assert runtimes.choose() == "emulator"


def test_a_library_compiles_ahead_of_time_without_cores(
    machine: Any, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = stand_in()
    library.install(monkeypatch)
    machine(Host(), TNX, **{runtimes.VARIABLE: "transformers_neuronx"})
    folder = artifact("llama", checkpoints).folder
    on = ["--instance", "inf2.xlarge", "--max-tokens", "64", "--cache", str(tmp_path)]
    assert run(["compile", str(folder), "--tensor-parallel", "2", *on]) == 0
    assert os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] == "inf2"
    assert environment.CORES not in os.environ
    assert "base.NeuronModelBase.cpu_compile" in library.names()
    machine(INF2, TNX, LMI_MULTI_NEURON_CACHE=str(tmp_path))
    library.calls.clear()
    load(folder, backend="neuron", tensor_parallel=2, max_tokens=64).close()
    assert "base.NeuronModelBase.load" in library.names()
    assert "base.NeuronModelBase.save" not in library.names()


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--instance", "trn2.48xlarge"], "runs on inf2 and trn1, not on trn2.48xlarge"),
        (["--instance", "inf2.xlarge", "--quantize", "int8"], "must be None with transformers_n"),
    ],
)
def test_what_a_library_cannot_compile_is_refused_before_it_is_converted(
    more: list[str],
    fault: str,
    machine: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine(INF2, TNX, LMI_MULTI_CACHE=str(tmp_path))
    assert run(["compile", "demo", *more]) != 0
    assert fault in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_through_the_library(
    machine: Any, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = stand_in()
    library.install(monkeypatch)
    machine(INF2, TNX)
    folder = artifact("llama", checkpoints).folder
    prompts = [[5, 6, 7, 8, 9], [11], list(range(3, 40))]
    with (
        load(folder, backend="cpu", max_tokens=64) as cpu,
        load(folder, backend="neuron", tensor_parallel=2, max_tokens=64) as ours,
    ):
        assert ours.device == "2 NeuronCores by transformers-neuronx"
        mine, theirs = (
            [c.token_ids for c in m.generate(prompts, max_new_tokens=8)] for m in (ours, cpu)
        )
    assert mine == theirs
    assert os.environ["NEURON_RT_VISIBLE_CORES"] == "0-1"


def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    machine: Any, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(INF2, TNX)
    given: dict[str, Any] = {"max_batch": None, "max_tokens": 64}
    llama = artifact("llama", checkpoints)
    with pytest.raises(
        OptionError, match=r"tensor_parallel is 4, but inf2.xlarge .* runs this model over 1, 2"
    ):
        BACKEND.load(llama, tensor_parallel=4, **given)
    monkeypatch.setattr(backend.sizing, "RESERVED", 10**12)
    monkeypatch.setattr("lmi_multi.fit.RESERVED", 10**12)
    with pytest.raises(CapacityError, match=r"does not fit 2 cores of inf2.xlarge: .* are missing"):
        BACKEND.load(llama, tensor_parallel=2, **given)
    machine(INF2, TNX, **{environment.INSTANCE: "trn2.48xlarge"})
    with pytest.raises(BackendError, match=r"runs on inf2 and trn1, not on trn2.48xlarge"):
        BACKEND.load(llama, tensor_parallel=2, **given)
    machine(Host(("/dev/neuron0",), None, INF2.cores), NXD)
    with pytest.raises(BackendError, match="does not tell its instance type; set LMI_MULTI_NEURON"):
        BACKEND.load(llama, tensor_parallel=2, **given)
    assert environment.CORES not in os.environ
