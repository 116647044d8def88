"""Endpoints made and removed: against moto's SageMaker, and where it never fails, against answers
that botocore holds beside the service's description."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import boto3
import pytest
from botocore import xform_name
from botocore.exceptions import ConnectTimeoutError
from botocore.stub import Stubber

from lmi_multi.cli.main import run
from lmi_multi.deploy import endpoint
from lmi_multi.deploy.aws import SAGEMAKER, SCALING
from lmi_multi.deploy.endpoint import create, remove
from lmi_multi.errors import AwsError
from tests.deploy.test_deployment import ROLE, deployment
from tests.moto_server import Moto

ARGS = ["deploy", "demo", "--instance", "ml.g5.xlarge", "--image", "image:1", "--role", ROLE]
ARN = "arn:aws:sagemaker:us-east-1:123456789012:"


@cache
def client_of(service: str) -> Any:
    return boto3.session.Session("test", "test", region_name="us-east-1").client(service)


class Sagemaker:
    """Clients whose requests and answers are written down before."""

    def __init__(self) -> None:
        self.stubs = {service: Stubber(client_of(service)) for service in (SAGEMAKER, SCALING)}
        self.told: list[str] = []
        self.states: list[str] = []

    def answers(self, upto: str, **last: Any) -> None:
        """Success for the calls that make `deployment()`, up to the first one called `upto`."""
        arns = {
            "CreateModel": {"ModelArn": ARN + "model/flan"},
            "CreateEndpointConfig": {"EndpointConfigArn": ARN + "endpoint-config/flan"},
            "CreateEndpoint": {"EndpointArn": ARN + "endpoint/flan"},
        }
        for call in deployment().calls():
            method = xform_name(call.operation)
            if call.operation == upto and last:
                self.stubs[SAGEMAKER].add_client_error(method, **last)
            else:
                self.stubs[SAGEMAKER].add_response(method, arns[call.operation], call.request)
            if call.operation == upto:
                return

    def is_in(self, state: str, reason: str | None = None) -> None:
        """What the next question for the endpoint is answered."""
        answer: dict[str, Any] = {
            "EndpointName": "flan",
            "EndpointArn": ARN + "endpoint/flan",
            "EndpointStatus": state,
            "CreationTime": 0,
            "LastModifiedTime": 0,
        }
        if reason is not None:
            answer["FailureReason"] = reason
        self.stubs[SAGEMAKER].add_response("describe_endpoint", answer, {"EndpointName": "flan"})

    def create(self) -> None:
        create(deployment(), self.told.append, self.states.append, poll=0)

    def done(self) -> None:
        for stub in self.stubs.values():
            stub.assert_no_pending_responses()


@pytest.fixture
def sagemaker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sagemaker]:
    monkeypatch.setattr(endpoint, "make_client", client_of)
    own = Sagemaker()
    with own.stubs[SAGEMAKER], own.stubs[SCALING]:
        yield own


# moto's server


def test_made_and_removed(aws: Moto, capsys: pytest.CaptureFixture[str]) -> None:
    client, scaling = aws.client(SAGEMAKER), aws.client(SCALING)
    assert run([*ARGS, "--name", "flan", "--max-instances", "2", "--env", "OPTION_DTYPE=fp16"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "flan\n"
    assert [line for line in shown.err.splitlines() if line.startswith("made ")] == [
        "made model flan",
        "made endpoint configuration flan",
        "made endpoint flan",
        "made scaling of flan",
        "made policy of flan",
    ]
    assert "endpoint flan: InService" in shown.err
    assert client.describe_endpoint(EndpointName="flan")["EndpointStatus"] == "InService"
    container = client.describe_model(ModelName="flan")["PrimaryContainer"]
    assert container["Environment"]["OPTION_DTYPE"] == "fp16"
    [variant] = client.describe_endpoint_config(EndpointConfigName="flan")["ProductionVariants"]
    assert variant["InstanceType"] == "ml.g5.xlarge" and "VolumeSizeInGB" not in variant
    [target] = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 2)

    assert run(["undeploy", "flan"]) == 0
    things = ("scaling of", "endpoint", "endpoint configuration", "model")
    assert capsys.readouterr().err.splitlines() == [f"removed {thing} flan" for thing in things]
    assert client.list_endpoints()["Endpoints"] == client.list_models()["Models"] == []
    assert client.list_endpoint_configs()["EndpointConfigs"] == []
    assert not scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]

    assert run(["undeploy", "flan"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"there is no {thing} flan" for thing in things]


def test_others_are_left_alone(aws: Moto) -> None:
    assert run([*ARGS, "--name", "flan"]) == run([*ARGS, "--name", "flan-2"]) == 0
    remove("flan", print, print)
    client = aws.client(SAGEMAKER)
    assert [e["EndpointName"] for e in client.list_endpoints()["Endpoints"]] == ["flan-2"]
    assert [m["ModelName"] for m in client.list_models()["Models"]] == ["flan-2"]


def test_a_dry_run_prints_the_calls(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a client is made")

    monkeypatch.setattr(endpoint, "make_client", never)
    assert run([*ARGS, "--max-instances", "2", "--dry-run"]) == 0
    calls = json.loads(capsys.readouterr().out)
    assert [call["operation"] for call in calls] == [
        *("CreateModel", "CreateEndpointConfig", "CreateEndpoint"),
        *("RegisterScalableTarget", "PutScalingPolicy"),
    ]
    assert calls[0]["request"]["ExecutionRoleArn"] == ROLE
    assert {call["service"] for call in calls} == {SAGEMAKER, SCALING}


def test_options_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--instance", "ml.g5.12xlarge", "--pipeline-parallel", "2", "--memory-share", "0.5"]
    assert run(["deploy", "demo", *own, *ARGS[4:], "--dry-run"]) == 0
    shown = capsys.readouterr()
    environment = json.loads(shown.out)[0]["request"]["PrimaryContainer"]["Environment"]
    assert environment["OPTION_PIPELINE_PARALLEL_DEGREE"] == "2"
    assert environment["OPTION_MEMORY_SHARE"] == "0.5"
    assert "fits at tensor_parallel 1, pipeline_parallel 2" in shown.err


def test_what_has_never_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for instance, said in (("inf2.xlarge", True), ("g5.xlarge", False)):
        args = ["deploy", "demo", "--instance", instance, *ARGS[4:], "--dry-run"]
        assert run(args) == 0
        assert ("nothing of this has run on a NeuronCore" in capsys.readouterr().err) == said


# What goes wrong


def test_it_is_waited_for(sagemaker: Sagemaker) -> None:
    sagemaker.answers("CreateEndpoint")
    for state in ("Creating", "Creating", "InService"):
        sagemaker.is_in(state)
    sagemaker.create()
    assert sagemaker.states == ["Creating", "Creating", "InService"]
    assert sagemaker.told[-1] == "made endpoint flan"
    sagemaker.done()


def test_the_reason_of_a_failure_is_shown(sagemaker: Sagemaker) -> None:
    sagemaker.answers("CreateEndpoint")
    sagemaker.is_in("Creating")
    sagemaker.is_in("Failed", "The container did not pass\nthe ping health check.")
    with pytest.raises(AwsError) as error:
        sagemaker.create()
    assert str(error.value) == (
        "endpoint flan is Failed: The container did not pass the ping health check.; its log is "
        "the CloudWatch group /aws/sagemaker/Endpoints/flan"
    )
    assert sagemaker.told[-1] == (
        "there may be by now: model flan, endpoint configuration flan, endpoint flan; "
        "`lmi-multi undeploy flan` removes everything of this name"
    )
    sagemaker.done()


def test_a_refusal_says_what_was_made_before(sagemaker: Sagemaker) -> None:
    sagemaker.answers(
        "CreateEndpoint",
        service_error_code="ResourceLimitExceeded",
        service_message="The account-level service limit 'ml.g5.12xlarge' is 0 Instances",
        http_status_code=400,
    )
    with pytest.raises(AwsError, match=r"CreateEndpoint: ResourceLimitExceeded: .*is 0 Instances"):
        sagemaker.create()
    assert "now: model flan, endpoint configuration flan; `lmi" in sagemaker.told[-1]


def test_nothing_was_made(sagemaker: Sagemaker) -> None:
    sagemaker.answers(
        "CreateModel",
        service_error_code="AccessDeniedException",
        service_message="not authorized to perform: sagemaker:CreateModel",
        http_status_code=400,
    )
    with pytest.raises(AwsError, match=r"CreateModel: .*\(docs/deploying.md lists the permissions"):
        sagemaker.create()
    assert sagemaker.told == []


def test_a_name_that_is_taken(sagemaker: Sagemaker) -> None:
    sagemaker.answers(
        "CreateModel",
        service_error_code="ValidationException",
        service_message=f'Cannot create already existing model "{ARN}model/flan".',
        http_status_code=400,
    )
    with pytest.raises(AwsError, match="there is a model flan already; choose another --name"):
        sagemaker.create()
    assert sagemaker.told == []


def test_a_lost_connection_leaves_it_open_what_was_made(
    sagemaker: Sagemaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object, **__: object) -> None:
        raise ConnectTimeoutError(endpoint_url="https://sagemaker")

    monkeypatch.setattr(client_of(SAGEMAKER), "create_model", lose)
    with pytest.raises(AwsError, match="CreateModel: ConnectTimeoutError"):
        sagemaker.create()
    assert sagemaker.told[-1].startswith("there may be by now: model flan; ")


def test_ctrl_c_while_it_waits(
    sagemaker: Sagemaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sagemaker.answers("CreateEndpoint")
    sagemaker.is_in("Creating")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(endpoint.time, "sleep", interrupt)
    monkeypatch.setattr("lmi_multi.deploy.prepare.prepare", lambda *a, **k: (deployment(), None))
    assert run(ARGS) == 130
    *_, before, last = capsys.readouterr().err.splitlines()
    assert last == "interrupted"
    assert before.startswith("there may be by now: model flan, ") and "undeploy flan" in before


def test_removing_waits_for_the_endpoint(sagemaker: Sagemaker) -> None:
    stub = sagemaker.stubs[SAGEMAKER]
    sagemaker.stubs[SCALING].add_client_error(
        "deregister_scalable_target", "ObjectNotFoundException", "No scalable target", 400
    )
    stub.add_response("delete_endpoint", {}, {"EndpointName": "flan"})
    sagemaker.is_in("Deleting")
    stub.add_client_error(
        "describe_endpoint", "ValidationException", 'Could not find endpoint "flan".', 400
    )
    stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": "flan"})
    stub.add_response("delete_model", {}, {"ModelName": "flan"})
    remove("flan", sagemaker.told.append, sagemaker.states.append, poll=0)
    assert sagemaker.states == ["Deleting"]
    assert sagemaker.told[0] == "there is no scaling of flan"
    sagemaker.done()


def test_scaling_that_stays_does_not_keep_the_endpoint(sagemaker: Sagemaker) -> None:
    stub = sagemaker.stubs[SAGEMAKER]
    sagemaker.stubs[SCALING].add_client_error(
        "deregister_scalable_target", "AccessDeniedException", "no", 400
    )
    stub.add_response("delete_endpoint", {})
    stub.add_client_error("describe_endpoint", "ValidationException", "Could not find", 400)
    stub.add_response("delete_endpoint_config", {})
    stub.add_response("delete_model", {})
    with pytest.raises(AwsError, match="DeregisterScalableTarget: AccessDenied"):
        remove("flan", sagemaker.told.append, sagemaker.states.append, poll=0)
    assert sagemaker.told[-1] == "removed model flan"
    sagemaker.done()


def test_an_endpoint_that_cannot_be_removed_keeps_its_configuration(sagemaker: Sagemaker) -> None:
    sagemaker.stubs[SCALING].add_response("deregister_scalable_target", {})
    sagemaker.stubs[SAGEMAKER].add_client_error("delete_endpoint", "ValidationException", "busy")
    with pytest.raises(AwsError, match="DeleteEndpoint: ValidationException: busy"):
        remove("flan", sagemaker.told.append, sagemaker.states.append, poll=0)
    sagemaker.done()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([*ARGS, "--env", "DTYPE"], 2, "'DTYPE' is not NAME=VALUE"),
        ([*ARGS, "--env", "A=1", "--env", "A=2"], 2, "A is given twice"),
        ([*ARGS, "--volume", "100"], 2, "volume is 100; allowed: nothing, as g5.xlarge has disks"),
        ([*ARGS, "--tensor-parallel", "2"], 2, "tensor_parallel is 2; allowed for this model on m"),
        (["undeploy", "a_b"], 2, "name is 'a_b'; allowed"),
        (ARGS[:-2], 2, "--role"),
    ],
)
def test_bad_usage(
    args: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LMI_MULTI_ROLE", raising=False)
    assert run(args) == code
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


def test_no_region_and_no_credentials(
    aws: Moto, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert run(ARGS) == 1
    assert "CreateModel: no AWS credentials were found" in capsys.readouterr().err
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert run(ARGS) == 1
    assert "error: no AWS region is set; set AWS_REGION" in capsys.readouterr().err
