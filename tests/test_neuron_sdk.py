"""Releases of the Neuron SDK, the runtime each is for, and the variables of a process."""

from __future__ import annotations

import importlib.metadata

import pytest
from lmi_multi.backends.neuron import environment, sdk
from lmi_multi.backends.neuron.sdk import Sdk

from lmi_multi.errors import BackendError

TORCH = {"torch-neuronx": "2.9.0.2.12.1"}
NXD = TORCH | {"neuronx-distributed": "0.18.27753"}
TNX = {"torch-neuronx": "2.7.0.2.9.8707", "transformers-neuronx": "0.13.1216"}


def having(compiler: str | None, packages: dict[str, str]) -> Sdk:
    return Sdk(packages if compiler is None else {"neuronx-cc": compiler, **packages})


# As AWS lists them: a release's compiler.
@pytest.mark.parametrize(
    ("compiler", "release"),
    [
        ("2.13.68.0", 18),
        ("2.20.9961.0", 25),
        ("2.23.6484.0", 28),
        ("2.26.6360.0", 31),
        ("2.28.7631.0", 33),
        ("3.0.1", None),
        ("2", None),
    ],
)
def test_the_compiler_tells_the_release(compiler: str, release: int | None) -> None:
    assert having(compiler, {}).release == release


@pytest.mark.parametrize(
    ("found", "runtime"),
    [
        (having("2.23.1", NXD), "nxd"),
        (having("2.26.1", NXD | TNX | TORCH), "nxd"),
        (having("2.20.1", TNX), "transformers_neuronx"),
        (having("2.16.1", TNX | NXD), "transformers_neuronx"),
        (having("2.22.1", NXD), None),
        (having("2.27.1", NXD), None),
        (having("2.24.1", TORCH), None),
        (having(None, NXD), None),
    ],
)
def test_a_release_is_for_one_runtime_at_most(found: Sdk, runtime: str | None) -> None:
    assert found.runtime() == runtime
    assert (found.fault() is None) == (runtime is not None)


@pytest.mark.parametrize(
    ("found", "runtime", "reason", "remedy"),
    [
        (
            having(None, {}),
            "",
            "the Neuron SDK is not installed (neuronx-cc is missing)",
            "install neuronx-cc==2.26.*",
        ),
        (having("3.1", NXD), "", "neuronx-cc 3.1 belongs to no known SDK 2", "neuronx-cc==2.26.*"),
        (
            having("2.22.1", NXD),
            "",
            "SDK 2.27 is too old for nxd (SDK 2.28 to 2.31) and too new for transformers_neuronx "
            "(SDK 2.21 to 2.25)",
            "torch-neuronx==2.9.* neuronx-distributed==0.19.* (SDK 2.31)",
        ),
        (having("2.28.1", NXD), "nxd", "SDK 2.33 is too new for nxd", "(SDK 2.31)"),
        (
            having("2.24.1", TNX),
            "transformers_neuronx",
            "SDK 2.29 is too new for transformers_neuronx (SDK 2.21 to 2.25)",
            "transformers-neuronx==0.13.* (SDK 2.25)",
        ),
        (
            having("2.24.1", TNX),
            "",
            "nxd needs torch-neuronx==2.9.*, neuronx-distributed on SDK 2.29",
            "install torch-neuronx==2.9.*, neuronx-distributed of SDK 2.29",
        ),
    ],
)
def test_faults_and_what_to_pin(found: Sdk, runtime: str, reason: str, remedy: str) -> None:
    fault = found.fault(runtime)
    assert fault is not None
    assert reason in fault[0]
    assert remedy in fault[1]


def test_installed_packages_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in NXD:
            return NXD[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sdk, "version", version)
    assert sdk.installed().versions == NXD


def test_flags_name_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    ours = environment.COMPILER_FLAGS
    assert environment.compiler_flags("trn1n.32xlarge") == f"{ours} --target=trn1"
    assert environment.compiler_flags("ml.inf2.xlarge") == f"{ours} --target=inf2"
    assert environment.compiler_flags(None) == environment.compiler_flags("p5.48xlarge") == ours
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O2 --target=trn2")
    assert environment.compiler_flags("inf2.xlarge") == "-O2 --target=trn2"


def test_variables_of_cores() -> None:
    assert environment.variables([8, 9, 10, 11]) == {
        "NEURON_RT_VISIBLE_CORES": "8-11",
        "NEURON_RT_NUM_CORES": "4",
    }
    assert environment.variables([3])["NEURON_RT_VISIBLE_CORES"] == "3"
    assert environment.variables([3, 5])["NEURON_RT_VISIBLE_CORES"] == "3,5"
    assert environment.parse_cores("0-3, 8") == [0, 1, 2, 3, 8]


def test_what_stands_already_must_be_the_same() -> None:
    own = {"NEURON_RT_NUM_CORES": "4"}
    environment.apply(environment.variables([0, 1, 2, 3]), own)
    assert own["NEURON_RT_VISIBLE_CORES"] == "0-3"
    with pytest.raises(
        BackendError, match="NEURON_RT_VISIBLE_CORES is '0-3', but this model runs on '8-11'"
    ):
        environment.apply(environment.variables([8, 9, 10, 11]), own)
