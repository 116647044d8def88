"""Makes an endpoint and removes it, and waits for SageMaker to have done so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from botocore import xform_name
from botocore.exceptions import BotoCoreError, ClientError

from lmi_multi.deploy.aws import (
    SAGEMAKER,
    SCALING,
    exists_already,
    failure,
    is_missing,
    is_refusal,
    make_client,
)
from lmi_multi.deploy.deployment import Call, Deployment, check_name, scalable
from lmi_multi.errors import AwsError, OptionError

POLL = 15.0
"""Seconds between two questions of how far an endpoint is."""
_UNDER_WAY = ("Creating", "Updating", "SystemUpdating", "RollingBack")

Tell = Callable[[str], None]


def create(deployment: Deployment, tell: Tell, status: Tell, poll: float = POLL) -> None:
    """Make the endpoint and wait until it is in service.

    `tell` gets a line for each thing that is made, and if this does not come to its end, also
    after Ctrl-C, one that says what exists by then: nothing is removed. `status` gets the
    endpoint's status whenever it was asked for. Raises AwsError with the reason of a failure.
    """
    calls = deployment.calls()
    clients = {service: make_client(service) for service in {call.service for call in calls}}
    made: list[str] = []
    try:
        for call in calls:
            _send(clients[call.service], call, made)
            tell(f"made {call.makes}")
            if call.operation == "CreateEndpoint":
                _wait_in_service(clients[SAGEMAKER], deployment.name, status, poll)
    except BaseException:
        if made:
            tell(
                f"there may be by now: {', '.join(made)}; `lmi-multi undeploy {deployment.name}` "
                "removes everything of this name"
            )
        raise


def _send(client: Any, call: Call, made: list[str]) -> None:
    """Make one call; `made` gets what it makes, unless AWS refuses."""
    made.append(call.makes)  # first, as Ctrl-C or a lost connection may hide the answer
    try:
        _operation(client, call.operation)(**call.request)
    except (BotoCoreError, ClientError) as error:
        if is_refusal(error):
            made.pop()
        if exists_already(error):
            raise AwsError(
                f"there is a {call.makes} already; choose another --name, or, if it is of no use, "
                "remove it with lmi-multi undeploy"
            ) from None
        raise failure(error, call.operation) from None


def _wait_in_service(client: Any, name: str, status: Tell, poll: float) -> None:
    while True:
        found = _describe(client, name)
        state = found["EndpointStatus"] if found else "gone"
        status(state)
        if state == "InService":
            return
        if state not in _UNDER_WAY:
            reason = (found or {}).get("FailureReason", "no reason is given")
            raise AwsError(
                f"endpoint {name} is {state}: {' '.join(reason.split())}; its log is the "
                f"CloudWatch group /aws/sagemaker/Endpoints/{name}"
            )
        time.sleep(poll)


def _describe(client: Any, name: str) -> dict[str, Any] | None:
    """What SageMaker says of the endpoint; None if there is none."""
    try:
        return dict(client.describe_endpoint(EndpointName=name))
    except (BotoCoreError, ClientError) as error:
        if is_missing(error):
            return None
        raise failure(error, "DescribeEndpoint") from None


def remove(name: str, tell: Tell, status: Tell, poll: float = POLL) -> None:
    """Remove what `create` makes under this name; what is not there is passed over.

    The endpoint goes first of all that costs money, and is waited for, as SageMaker wants its
    configuration to outlive it. `tell` gets a line for each thing, `status` the endpoint's status.
    Raises AwsError; scaling that cannot be removed keeps nothing else from being removed.
    """
    check_name(name)
    client, scaling = make_client(SAGEMAKER), make_client(SCALING)
    failed: AwsError | OptionError | None = None
    try:
        _remove(scaling, "DeregisterScalableTarget", scalable(name), f"scaling of {name}", tell)
    except AwsError as error:
        failed = error
    _remove(client, "DeleteEndpoint", {"EndpointName": name}, f"endpoint {name}", tell)
    while found := _describe(client, name):
        status(found["EndpointStatus"])
        time.sleep(poll)
    config = {"EndpointConfigName": name}
    _remove(client, "DeleteEndpointConfig", config, f"endpoint configuration {name}", tell)
    _remove(client, "DeleteModel", {"ModelName": name}, f"model {name}", tell)
    if failed is not None:
        raise failed


def _remove(client: Any, operation: str, request: dict[str, str], what: str, tell: Tell) -> None:
    try:
        _operation(client, operation)(**request)
    except (BotoCoreError, ClientError) as error:
        if not is_missing(error):
            raise failure(error, operation) from None
        tell(f"there is no {what}")
    else:
        tell(f"removed {what}")


def _operation(client: Any, name: str) -> Callable[..., Any]:
    """A client's method for an operation, which botocore calls otherwise."""
    method: Callable[..., Any] = getattr(client, xform_name(name))
    return method
