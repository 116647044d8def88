"""`s3://bucket/prefix`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lmi_multi.errors import OptionError

SCHEME = "s3://"
_BUCKET = re.compile(r"[a-zA-Z0-9._-]{3,255}")


@dataclass(frozen=True)
class Address:
    """A folder on S3: the objects directly below `prefix`, which has no slash at its end.

    An empty prefix is the whole bucket.
    """

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address. Raises OptionError for anything else."""
        bucket, _, prefix = text.removeprefix(SCHEME).partition("/")
        if not text.startswith(SCHEME) or not _BUCKET.fullmatch(bucket):
            raise OptionError(f"{text!r} is no address on S3, expected s3://BUCKET/PREFIX")
        return cls(bucket, prefix.rstrip("/"))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def start(self) -> str:
        """What the keys of this folder's objects start with."""
        return f"{self.prefix}/" if self.prefix else ""

    def key(self, name: str) -> str:
        """The key of the object `name`."""
        return self.start + name

    def url(self, name: str) -> str:
        """The object `name` in full, for messages."""
        return f"{SCHEME}{self.bucket}/{self.key(name)}"


def is_address(source: object) -> bool:
    """Whether `source` names a place on S3."""
    return isinstance(source, str) and source.startswith(SCHEME)
