"""Which transport to use, by the environment variable LMI_MULTI_S3."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.ranges import BotoTransport, Transport
from lmi_multi.errors import OptionError

VARIABLE = "LMI_MULTI_S3"
CHOICES = ("auto", "boto3", "crt", "s5cmd")
THREADS = 16


def choice() -> str:
    """boto3, crt or s5cmd: what the environment asks for, and is installed.

    `auto` is boto3's own judgement: the CRT where it is installed and made for this machine.
    Raises OptionError for an unknown value, and for a transport that is not installed.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in CHOICES:
        raise OptionError(f"{VARIABLE} is {asked!r}, must be one of {', '.join(CHOICES)}")
    if asked == "auto":
        return "crt" if _has_crt() and _crt_fits() else "boto3"
    if asked == "crt" and not _has_crt():
        raise OptionError(f"{VARIABLE} is 'crt', but awscrt is not installed: boto3[crt] has it")
    if asked == "s5cmd" and shutil.which("s5cmd") is None:
        raise OptionError(f"{VARIABLE} is 's5cmd', but there is no such command on the PATH")
    return asked


def ranged(chosen: str, client: Any, address: Address) -> Transport:
    """The transport for ranges; beside s5cmd, which has none, boto3 fetches the manifest."""
    if chosen == "crt":
        from lmi_multi.checkpoint.s3.crt import CrtTransport

        return CrtTransport(client, address)
    return BotoTransport(client, address, THREADS)


def _has_crt() -> bool:
    return importlib.util.find_spec("awscrt") is not None


def _crt_fits() -> bool:
    import awscrt.s3

    return bool(awscrt.s3.is_optimized_for_system())
