"""The client of boto3, and one line for each way in which S3 says no."""

from __future__ import annotations

import os
from typing import Any

from lmi_multi.errors import CheckpointError

ATTEMPTS = 8  # of one request; boto3's own default of 3 gives up within a second of throttling
_REFUSED = ("ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")
_DENIED = ("AccessDenied", "AllAccessDisabled", "403")
_BUSY = ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "500", "503")
_MISSING = ("NoSuchKey", "404")


def make_client(connections: int = 10, signature: str | None = None) -> Any:
    """A client with adaptive retries, configured as any AWS tool is.

    `connections` are kept open at most. `signature` overrides how requests are signed: addresses
    that are signed for others still get version 2 by default, which newer regions refuse.

    Credentials, region, AWS_PROFILE, AWS_ENDPOINT_URL, AWS_MAX_ATTEMPTS and AWS_CA_BUNDLE are
    honoured by boto3 itself. Raises CheckpointError when what they say is contradictory.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    retries: dict[str, Any] = {"mode": "adaptive"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = ATTEMPTS
    config = Config(
        retries=retries,
        max_pool_connections=connections,
        connect_timeout=10,
        read_timeout=30,
        signature_version=signature,
        user_agent_extra="lmi_multi",
    )
    try:
        # A session of its own: the default one is not safe to share between threads.
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise CheckpointError(f"S3 cannot be used: {first_line(error)}") from None


def failure(error: Exception, url: str) -> CheckpointError:
    """One line that says what `error` of boto3 means for `url`."""
    from botocore import exceptions as known

    if isinstance(error, known.ClientError):
        return _answered(error, url)
    if isinstance(
        error,
        known.NoCredentialsError | known.PartialCredentialsError | known.CredentialRetrievalError,
    ):
        return CheckpointError(
            f"{url}: no AWS credentials were found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give the instance or container a role"
        )
    if isinstance(error, known.HTTPClientError | known.ConnectionError):
        return CheckpointError(f"{url}: S3 cannot be reached: {first_line(error)}")
    return CheckpointError(f"{url}: {type(error).__name__}: {first_line(error)}")


def code_of(error: Exception) -> str:
    """The code of an answer of S3, such as NoSuchKey; empty for any other error."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _answered(error: Any, url: str) -> CheckpointError:
    code, metadata = code_of(error), error.response.get("ResponseMetadata", {})
    if code == "NoSuchBucket":
        return CheckpointError(f"{url}: there is no such bucket")
    if code in _DENIED:
        return CheckpointError(
            f"{url}: access denied ({error.operation_name}); reading needs s3:ListBucket and "
            "s3:GetObject, writing s3:PutObject and s3:DeleteObject too"
        )
    if code in _REFUSED:
        return CheckpointError(f"{url}: S3 refuses the AWS credentials: {code}")
    if code in _MISSING:
        return CheckpointError(f"{url} does not exist")
    if code in _BUSY:
        count = metadata.get("RetryAttempts", 0) + 1
        return CheckpointError(
            f"{url}: S3 still answers {metadata.get('HTTPStatusCode')} ({code}) after {count} "
            "attempts; try again later, or raise AWS_MAX_ATTEMPTS"
        )
    said = error.response.get("Error", {}).get("Message", "")
    return CheckpointError(f"{url}: S3 answers {code}: {said:.200}")


def first_line(error: Exception) -> str:
    """The first line of what an error says, at most 200 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
