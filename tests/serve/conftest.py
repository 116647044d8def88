"""S3 on loopback, for servers that read from it."""

from tests.checkpoint.conftest import moto, s3

__all__ = ["moto", "s3"]
