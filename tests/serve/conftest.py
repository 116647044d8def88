"""S3 on loopback, for servers that read from it."""

from tests.checkpoint.conftest import s3

__all__ = ["s3"]
