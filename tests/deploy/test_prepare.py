"""What is checked before any call: where the model is, its settings, whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmi_multi.checkpoint.publish import publish
from lmi_multi.deploy import prepare as module
from lmi_multi.deploy.deployment import Deployment
from lmi_multi.deploy.prepare import place, prepare, volume
from lmi_multi.errors import CapacityError, LmiError, OptionError
from lmi_multi.fit import Network, Option
from lmi_multi.instances import GIB, find
from lmi_multi.models.spec import ModelSpec, Rope
from lmi_multi.serve.settings import ServeSettings
from tests.checkpoint.tiny import llama_state, write
from tests.deploy.test_deployment import ROLE
from tests.moto_server import Moto


def network(layers: int, *, artifact: bool = False) -> Network:
    """A Llama whose layers have about 0.4 GB in bf16."""
    spec = ModelSpec(
        family="llama",
        vocab=32_000,
        hidden=4096,
        heads=32,
        kv_heads=32,
        ffn=11_008,
        position=Rope(dim=128),
        decoder_layers=layers,
        max_positions=4096,
        norm="rms",
        gated=True,
        activation="silu",
    )
    modules = ["embed", "norm", "head"] + [
        f"decoder.{layer}.{name}"
        for layer in range(layers)
        for name in ("norm1", "norm2", "qkv", "out", "up", "down")
    ]
    return Network("big", spec, tuple(f"{m}.weight" for m in modules), "bf16", None, artifact)


def settings(**fields: Any) -> ServeSettings:
    return ServeSettings(model="big", **fields)


def prepared(
    model: str, instance: str = "ml.g5.12xlarge", environment: Any = None, **fields: Any
) -> tuple[Deployment, Option | None]:
    names = module.VARIABLES.keys() - {"startup_timeout"}
    wanted = {name: fields.pop(name) for name in names & fields.keys()}
    return prepare(
        model,
        instance,
        settings=wanted,
        environment=environment or {},
        image="image:1",
        role=ROLE,
        **fields,
    )


def test_the_least_degree_that_fits() -> None:
    g5 = find("g5.12xlarge")  # four devices of 22 GiB
    assert place(network(8), g5, settings()).tensor_parallel == 1
    assert place(network(70), g5, settings()).tensor_parallel == 2
    assert place(network(70), g5, settings(quantize="int8")).tensor_parallel == 1
    assert place(network(8), g5, settings(tensor_parallel="max")).tensor_parallel == 4
    assert place(network(8), g5, settings(tensor_parallel=2)).tensor_parallel == 2


def test_stages_have_gpus_of_their_own() -> None:
    g5 = find("g5.12xlarge")
    both = place(network(70), g5, settings(pipeline_parallel=2))
    assert (both.tensor_parallel, both.pipeline_parallel) == (1, 2)
    most = place(network(8), g5, settings(tensor_parallel="max", pipeline_parallel=2))
    assert (most.tensor_parallel, most.pipeline_parallel) == (2, 2)
    for name, allowed in (("g5.12xlarge", 4), ("inf2.24xlarge", 1)):
        with pytest.raises(OptionError) as error:
            place(network(8), find(name), settings(pipeline_parallel=5))
        assert str(error.value) == (
            f"pipeline_parallel is 5; allowed on ml.{name}: an integer from 1 to {allowed}"
        )


def test_what_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapacityError) as error:
        place(network(70), find("g5.xlarge"), settings())
    assert "big does not fit ml.g5.xlarge at tensor_parallel 1: " in str(error.value)
    missing = "of device memory are missing for the weights and what a step needs beside them"
    assert f"{missing}; it fits ml." in str(error.value)
    with pytest.raises(CapacityError, match=r"at tensor_parallel 1: .*missing"):
        place(network(70), find("g5.12xlarge"), settings(tensor_parallel=1))
    monkeypatch.setattr(module, "INSTANCES", (find("g5.xlarge"), find("g6.xlarge")))
    with pytest.raises(CapacityError, match="no instance takes it in this format"):
        place(network(70), find("g5.xlarge"), settings())


def test_impossible_settings() -> None:
    with pytest.raises(OptionError, match=r"tensor_parallel is 3; allowed for this model on ml.g5"):
        place(network(8), find("g5.12xlarge"), settings(tensor_parallel=3))
    with pytest.raises(OptionError, match="'fp32' and quantize None, but big was converted with"):
        place(network(8, artifact=True), find("g5.12xlarge"), settings(dtype="fp32"))
    with pytest.raises(OptionError, match="max_tokens"):
        place(network(8), find("g5.12xlarge"), settings(max_tokens=9999))


def test_the_volume_holds_the_model_twice_where_it_is_converted() -> None:
    machine = find("inf2.24xlarge")
    option = place(network(70), machine, settings())
    weights = option.weight_bytes * option.tensor_parallel / GIB
    assert 0 <= volume(network(70), option) - (20 + 2 * weights) < 1
    assert 0 <= volume(network(70, artifact=True), option) - (20 + weights) < 1
    large = option.model_copy(update={"weight_bytes": 2**40})
    with pytest.raises(OptionError, match=r"allowed: 512 GiB; convert it first"):
        volume(network(70), large)


def test_the_demo_is_ready_to_go() -> None:
    own, option = prepared("demo", max_tokens=100, dtype="fp16")
    assert option is not None and option.fits
    assert own.environment == {
        "OPTION_MODEL_ID": "demo",
        "OPTION_DTYPE": "fp16",
        "OPTION_MAX_MODEL_LEN": "100",
        "OPTION_MODEL_LOADING_TIMEOUT": "1800",
        "OPTION_TENSOR_PARALLEL_DEGREE": "1",
    }
    read = ServeSettings.read(command_line={}, environ=own.environment)
    assert (read.model, read.dtype, read.max_tokens) == ("demo", "fp16", 100)
    assert read.startup_timeout == own.startup_timeout
    assert prepared("demo", "inf2.xlarge")[0].volume == 21
    assert prepared("demo", "inf2.xlarge", volume=30)[0].volume == 30


def test_stages_and_a_share_of_the_memory_reach_the_server() -> None:
    own, option = prepared("demo", pipeline_parallel=2, memory_share=0.5)
    assert option is not None and (option.tensor_parallel, option.pipeline_parallel) == (1, 2)
    read = ServeSettings.read(command_line={}, environ=own.environment)
    assert (read.tensor_parallel, read.pipeline_parallel, read.memory_share) == (1, 2, 0.5)
    full = prepared("demo", pipeline_parallel=2)[1]
    assert full is not None and option.cache_bytes < full.cache_bytes


def test_a_model_on_s3_needs_only_its_headers(aws: Moto, tmp_path: Path) -> None:
    aws.client("s3").create_bucket(Bucket="models")
    folder = write(tmp_path / "llama", llama_state())
    publish(str(folder), "s3://models/llama", dtype="bf16")
    own, option = prepared("s3://models/llama")
    assert option is not None and option.dtype == "bf16"
    assert own.name == "llama" and "OPTION_MODEL_ID" not in own.environment
    with pytest.raises(LmiError, match="s3://models/nothing"):
        prepared("s3://models/nothing")


def test_unchecked_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Network:
        raise AssertionError("read")

    monkeypatch.setattr(module, "read_network", never)
    own, option = prepared("s3://models/nothing", check=False)
    assert option is None and "OPTION_TENSOR_PARALLEL_DEGREE" not in own.environment
    with pytest.raises(AssertionError, match="read"):
        prepared("s3://models/nothing")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "./model"}, "MODEL is './model', which an endpoint cannot reach"),
        ({"model": ""}, "MODEL is '', which an endpoint"),
        ({"model": "s3://"}, "'s3://' is no address on S3"),
        ({"model": "demo", "instance": "ml.g5.7xlarge"}, "did you mean 'g5."),
        ({"model": "demo", "dtype": "fp4"}, "OPTION_DTYPE is 'fp4'; allowed: auto, fp32"),
        ({"model": "demo", "environment": {"OPTION_DTYP": "x"}}, "did you mean 'OPTION_DTYPE'"),
        (
            {"model": "demo", "dtype": "fp16", "environment": {"OPTION_DTYPE": "fp32"}},
            "OPTION_DTYPE is 'fp32', yet an option sets it to 'fp16'; allowed: one of them",
        ),
        ({"model": "demo", "environment": {"LMI_MULTI_API_KEY": "secret"}}, "allowed: no key, as"),
        ({"model": "demo", "startup_timeout": 10}, "startup_timeout is 10; allowed"),
        ({"model": "demo", "pipeline_parallel": 9}, "pipeline_parallel is 9, but the "),
        (
            {"model": "demo", "pipeline_parallel": 0},
            "OPTION_PIPELINE_PARALLEL_DEGREE is '0'; allowed",
        ),
        ({"model": "demo", "memory_share": 2.0}, "OPTION_MEMORY_SHARE is '2.0'; allowed: a number"),
        (
            {"model": "demo", "memory_share": 0.5, "instance": "inf2.xlarge"},
            "memory_share is 0.5; allowed on ml.inf2.xlarge: nothing",
        ),
        ({"model": "demo", "revision": "main"}, "is a local folder without any"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        prepared(**given)
    assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_a_folder_of_a_models_name_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="lmi-multi convert gpt2 s3://"):
        prepared("gpt2", check=False)
