"""Clients of boto3 for SageMaker, and one line for each way in which AWS says no."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from lmi_multi.checkpoint.s3.client import code_of, first_line
from lmi_multi.errors import AwsError, OptionError

SAGEMAKER, RUNTIME, SCALING = "sagemaker", "sagemaker-runtime", "application-autoscaling"
_READ_TIMEOUT = 70  # seconds: SageMaker waits 60 for an answer, and says to wait longer than that
_DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation")


def make_client(service: str) -> Any:
    """A client, configured as any AWS tool is: by AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, ...

    Raises AwsError when what they say is contradictory or names no region.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, NoRegionError

    config = Config(
        retries={"mode": "adaptive"},
        connect_timeout=10,
        read_timeout=_READ_TIMEOUT,
        user_agent_extra="lmi_multi",
    )
    try:
        return boto3.session.Session().client(service, config=config)
    except NoRegionError:
        raise AwsError("no AWS region is set; set AWS_REGION, or one in AWS_PROFILE") from None
    except (BotoCoreError, ValueError) as error:
        raise AwsError(f"{service} cannot be used: {first_line(error)}") from None


@cache
def values(shape: str) -> frozenset[str]:
    """The values that SageMaker's own description of its interface allows for `shape`."""
    import botocore.session

    model = botocore.session.get_session().get_service_model(SAGEMAKER)
    return frozenset(model.shape_for(shape).enum)


def is_refusal(error: Exception) -> bool:
    """Whether AWS has answered, and done nothing."""
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if response else 0
    return 400 <= int(status) < 500


def is_missing(error: Exception) -> bool:
    """Whether AWS says that what a request names does not exist.

    SageMaker has no code of its own for that, only words.
    """
    if code_of(error) == "ObjectNotFoundException":
        return True
    said = message_of(error).lower()
    is_validation = code_of(error) in ("ValidationException", "ValidationError")
    return is_validation and ("could not find" in said or "no scalable target found" in said)


def exists_already(error: Exception) -> bool:
    """Whether AWS says that the name is taken."""
    return "already existing" in message_of(error).lower()


def message_of(error: Exception) -> str:
    """What AWS said, without what boto3 puts before it."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Message", "")) if isinstance(response, dict) else ""


def failure(error: Exception, what: str) -> AwsError | OptionError:
    """One line that says what `error` of boto3 means while `what` was done."""
    from botocore import exceptions as known

    if isinstance(error, known.ParamValidationError):
        return OptionError(f"{what}: {' '.join(str(error).split())[:300]}")
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
        return AwsError(
            f"{what}: no AWS credentials were found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    if not isinstance(error, known.ClientError):
        return AwsError(f"{what}: {type(error).__name__}: {first_line(error)}")
    code, said = code_of(error), " ".join(message_of(error).split())[:500]
    if code == "ModelError":
        return AwsError(f"{what}: the container answers {_original(error.response)}")
    if code in _DENIED:
        said += " (docs/deploying.md lists the permissions)"
    return AwsError(f"{what}: {code}: {said}")


def _original(response: dict[str, Any]) -> str:
    """Status and message of the container; its own JSON says the message without frills."""
    said = str(response.get("OriginalMessage", ""))
    try:
        body = json.loads(said)
        inner = body.get("error", said)
        said = inner.get("message", said) if isinstance(inner, dict) else str(inner)
    except (ValueError, AttributeError):  # no JSON, or no object
        pass
    return f"{response.get('OriginalStatusCode', '')}: {' '.join(said.split())[:500]}"
