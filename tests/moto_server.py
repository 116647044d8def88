"""AWS on 127.0.0.1: moto's server."""

from __future__ import annotations

import http.client
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lmi_multi.deploy.aws import values

REGION = "us-east-1"


@dataclass(frozen=True)
class Moto:
    """A server at `place`, (host, port)."""

    place: tuple[str, int]

    @property
    def url(self) -> str:
        return f"http://{self.place[0]}:{self.place[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes any AWS tool talk to it and to nobody else."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, service: str) -> Any:
        """A client that talks to it directly."""
        import boto3

        session = boto3.session.Session("test", "test", region_name=REGION)
        return session.client(service, endpoint_url=self.url)

    def reset(self) -> None:
        """Forget everything."""
        link = http.client.HTTPConnection(*self.place, timeout=30)
        link.request("POST", "/moto-api/reset")
        assert link.getresponse().status == 200
        link.close()


@contextmanager
def serve() -> Iterator[Moto]:
    """Run it on a free port."""
    from moto.sagemaker.models import FakeEndpointConfig
    from moto.server import ThreadedMotoServer

    # Its list of SageMaker's instances ends before the GPUs and NeuronCores of today.
    FakeEndpointConfig.validate_instance_type = _known  # type: ignore[method-assign]
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield Moto(server.get_host_and_port())
    finally:
        server.stop()


def _known(_: object, instance_type: str) -> None:
    assert instance_type in values("ProductionVariantInstanceType"), instance_type
