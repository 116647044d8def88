"""What is sent to AWS, beside AWS's own description of what it takes."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import botocore.session
import pytest
from botocore.model import Shape
from botocore.validate import ParamValidator
from hypothesis import given, settings
from hypothesis import strategies as st

from lmi_multi.deploy.deployment import Call, Deployment, check_name, name_for
from lmi_multi.errors import OptionError
from lmi_multi.instances import INSTANCES, find

ROLE = "arn:aws:iam::123456789012:role/service-role/endpoints"
GIVEN: dict[str, Any] = {
    "model": "s3://models/flan-t5-xl",
    "instance": find("g5.12xlarge"),
    "image": "123456789012.example/lmi_multi:0.1.0",
    "role": ROLE,
    "name": "flan",
    "environment": {"OPTION_DTYPE": "bf16"},
}


def deployment(**changes: Any) -> Deployment:
    return Deployment(**GIVEN | changes)


def python(pattern: str) -> str:
    """A pattern of Java as one of Python."""
    pairs = r"\uD800\uDC00-\uDBFF\uDFFF"
    return pattern.replace(pairs, "").replace(r"\p{Print}", "[ -~]")


def breaches(shape: Shape, value: Any, path: str = "") -> list[str]:
    """What the service's description does not allow: patterns and words, which boto3 leaves to
    the service."""
    if shape.type_name == "structure":
        members = shape.members  # type: ignore[attr-defined]
        return [b for n, v in value.items() for b in breaches(members[n], v, f"{path}.{n}")]
    if shape.type_name == "list":
        return [b for v in value for b in breaches(shape.member, v, path)]  # type: ignore[attr-defined]
    if shape.type_name == "map":
        return [b for v in value.values() for b in breaches(shape.value, v, path)]  # type: ignore[attr-defined]
    found = []
    if shape.type_name == "string":
        pattern, words = shape.metadata.get("pattern"), shape.metadata.get("enum")
        if pattern and not re.fullmatch(python(pattern), value):
            found.append(f"{path}: {value!r} is no {pattern}")
        if words and value not in words:
            found.append(f"{path}: {value!r} is unknown")
        if len(value) > shape.metadata.get("max", len(value)):
            found.append(f"{path}: too long")
    elif value > shape.metadata.get("max", value):
        found.append(f"{path}: {value} is too large")
    return found


@cache
def input_shape(service: str, operation: str) -> Shape:
    model = botocore.session.get_session().get_service_model(service)
    return model.operation_model(operation).input_shape


def judge(calls: list[Call]) -> None:
    for call in calls:
        shape = input_shape(call.service, call.operation)
        report = ParamValidator().validate(call.request, shape)
        assert not report.has_errors(), report.generate_report()
        assert breaches(shape, call.request) == []


@pytest.mark.parametrize("instance", [i for i in INSTANCES if i.name != "trn2.3xlarge"])
def test_every_instance_is_described_as_aws_wants_it(instance: Any) -> None:
    volume = None if instance.has_disk else 512
    judge(deployment(instance=instance, volume=volume, max_instances=4).calls())


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        dict,
        name=st.from_regex(r"\A[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}\Z"),
        image=st.text(st.characters(codec="ascii", exclude_categories=["Z", "C"]), min_size=1),
        download_timeout=st.integers(60, 3600),
        startup_timeout=st.integers(60, 3600),
        invocations=st.integers(1, 10**6),
        instances=st.integers(1, 500),
        max_instances=st.integers(500, 1000),
    )
)
def test_whatever_is_accepted_is_allowed(changes: dict[str, Any]) -> None:
    try:
        own = deployment(**changes)
    except OptionError:  # hypothesis draws names and images beyond their lengths too
        assert len(changes["name"]) > 63 or len(changes["image"]) > 255
    else:
        judge(own.calls())


def test_the_calls() -> None:
    own = deployment(max_instances=3, invocations=90, ami="al2-ami-sagemaker-inference-gpu-3-1")
    calls = own.calls()
    assert [call.operation for call in calls] == [
        *("CreateModel", "CreateEndpointConfig", "CreateEndpoint"),
        *("RegisterScalableTarget", "PutScalingPolicy"),
    ]
    model, config, endpoint, target, policy = (call.request for call in calls)
    assert model == {
        "ModelName": "flan",
        "ExecutionRoleArn": ROLE,
        "PrimaryContainer": {
            "Image": GIVEN["image"],
            "Environment": {"OPTION_DTYPE": "bf16"},
            "ModelDataSource": {
                "S3DataSource": {
                    "S3Uri": "s3://models/flan-t5-xl/",
                    "S3DataType": "S3Prefix",
                    "CompressionType": "None",
                }
            },
        },
    }
    assert config["ProductionVariants"] == [
        {
            "VariantName": "all",
            "ModelName": "flan",
            "InstanceType": "ml.g5.12xlarge",
            "InitialInstanceCount": 1,
            "ModelDataDownloadTimeoutInSeconds": 3600,
            "ContainerStartupHealthCheckTimeoutInSeconds": 1800,
            "InferenceAmiVersion": "al2-ami-sagemaker-inference-gpu-3-1",
        }
    ]
    assert endpoint == {"EndpointName": "flan", "EndpointConfigName": "flan"}
    assert target["ResourceId"] == policy["ResourceId"] == "endpoint/flan/variant/all"
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 3)
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["TargetValue"] == 90.0


def test_a_hub_model_is_fetched_by_the_container() -> None:
    assert "ModelDataSource" not in deployment(model="gpt2").calls()[0].request["PrimaryContainer"]


def test_one_instance_does_not_scale() -> None:
    assert len(deployment(instances=2, max_instances=2).calls()) == 3


def test_a_volume_only_where_there_are_no_disks() -> None:
    [variant] = (
        deployment(instance=find("inf2.8xlarge"), volume=100)
        .calls()[1]
        .request["ProductionVariants"]
    )
    assert variant["VolumeSizeInGB"] == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume": 100}, "volume is 100; allowed: nothing, as g5.12xlarge has disks of its own"),
        ({"instance": find("inf2.xlarge"), "volume": 513}, "volume is 513; allowed: an integer fr"),
        ({"instance": find("trn2.3xlarge")}, "instance is 'trn2.3xlarge'; allowed: types that Sag"),
        ({"name": "a_b"}, "name is 'a_b'; allowed: at most 63 letters"),
        ({"name": "-a"}, "name is '-a'; allowed"),
        ({"name": "a\n"}, "name is 'a\\n'; allowed"),
        ({"name": "a" * 64}, "allowed: at most 63 letters"),
        ({"role": "admin"}, "role is 'admin'; allowed: the ARN of a role, arn:aws:iam::ACCOUNT"),
        ({"image": "a b"}, "image is 'a b'; allowed: an image in a registry"),
        ({"image": ""}, "image is ''; allowed"),
        ({"instances": 0}, "instances is 0; allowed: an integer from 1 to 1000"),
        ({"instances": True}, "instances is True; allowed"),
        ({"instances": 3, "max_instances": 2}, "max_instances is 2; allowed: at least 3"),
        ({"invocations": 0}, "invocations is 0; allowed: an integer from 1"),
        ({"download_timeout": 59}, "download_timeout is 59; allowed: an integer from 60 to 3600"),
        ({"startup_timeout": 3601}, "startup_timeout is 3601; allowed: an integer from 60"),
        ({"ami": "newest"}, "ami is 'newest'; allowed: al2-ami-sagemaker-inference-gpu-2, "),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        deployment(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("google/flan-t5-base", "flan-t5-base"),
        ("s3://models/Qwen3_0.6B/", "Qwen3-0-6B"),
        ("s3://models", "models"),
        ("demo", "demo"),
        ("x/" + "a" * 62 + "-b", "a" * 62),
        ("s3://models/___", "model"),
    ],
)
def test_names(model: str, name: str) -> None:
    assert name_for(model) == name
    check_name(name)
