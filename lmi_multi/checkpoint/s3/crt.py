"""Ranged gets over the AWS Common Runtime, which splits and multiplies them outside of Python.

boto3's own use of it neither pins an ETag nor resumes nor knows custom endpoints. Here boto3 signs
an address for each part, and the runtime's client, which itself signs nothing, fetches it.
"""

from __future__ import annotations

from functools import lru_cache
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.client import first_line
from lmi_multi.checkpoint.s3.listing import Object
from lmi_multi.checkpoint.s3.ranges import BrokenOffError, Sink, check_range, refused

PART = 64 * 2**20  # which the runtime gets in pieces of its own
THREADS = 8  # these only wait
_SECONDS = 3600  # an address is signed when its part begins


class CrtTransport:
    """The runtime's client, which decides by itself how many connections a machine deserves."""

    def __init__(self, client: Any, address: Address) -> None:
        self._client, self._address = client, address
        self._crt = _crt_client(client.meta.endpoint_url)
        self.part_size, self.threads, self.stop = PART, THREADS, Event()

    def url(self, item: Object) -> str:
        """See `Transport.url`."""
        return self._address.url(item.name)

    def get(self, item: Object, start: int, stop: int, sink: Sink) -> None:
        """See `Transport.get`."""
        from awscrt.exceptions import AwsCrtError
        from awscrt.s3 import S3RequestType, S3ResponseError

        state = _State(start, stop, sink)
        request = self._crt.make_request(
            type=S3RequestType.GET_OBJECT,
            request=self._request(item, start, stop),
            on_headers=state.headers,
            on_body=state.body,
        )
        state.cancel = request.cancel
        try:
            request.finished_future.result()
        except S3ResponseError as error:
            raise refused(self._client, self._address, item, self._parsed(error)) from None
        except AwsCrtError as error:
            if state.error is not None:
                raise state.error from None
            raise BrokenOffError(first_line(error)) from None
        finally:
            state.cancel = None  # the request holds the state: no circle
        if state.error is not None:
            raise state.error
        check_range(self.url(item), state.range, item, start, stop)

    def _request(self, item: Object, start: int, stop: int) -> Any:
        from awscrt.http import HttpHeaders, HttpRequest

        signed = urlsplit(
            self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self._address.bucket, "Key": self._address.key(item.name)},
                ExpiresIn=_SECONDS,
            )
        )
        headers = {
            "Host": signed.netloc,
            "Range": f"bytes={start}-{stop - 1}",
            "If-Match": item.etag,
            "Content-Length": "0",
        }
        return HttpRequest("GET", f"{signed.path}?{signed.query}", HttpHeaders(headers.items()))

    def _parsed(self, error: Any) -> Exception:
        """The runtime's error as boto3 would raise it."""
        from botocore.exceptions import ClientError
        from botocore.parsers import create_parser

        answer = {
            "headers": dict(error.headers or ()),
            "status_code": error.status_code,
            "body": error.body or b"",
        }
        parsed: Exception = ClientError(create_parser("rest-xml").parse(answer, None), "GetObject")
        return parsed


class _State:
    """One request's progress, told by the runtime's thread."""

    def __init__(self, start: int, stop: int, sink: Sink) -> None:
        self.position, self._stop, self._sink = start, stop, sink
        self.range: str | None = None
        self.error: Exception | None = None
        self.cancel: Any = None

    def headers(self, status_code: int, headers: list[tuple[str, str]], **_: Any) -> None:
        found = {name.lower(): value for name, value in headers}
        self.range = found.get("content-range")

    def body(self, chunk: bytes, offset: int, **_: Any) -> None:
        if self.error is not None:
            return
        try:
            self._sink(self.position, chunk)
            self.position += len(chunk)
        except Exception as error:  # raised in `get`: the runtime could only print it
            self.error = error
            if self.cancel is not None:
                self.cancel()


@lru_cache(maxsize=2)
def _crt_client(endpoint: str) -> Any:
    """One client a process and endpoint: each has threads and connections of its own.

    One for several endpoints would mix up those that differ in their port alone.
    """
    from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
    from awscrt.s3 import S3Client, S3RequestTlsMode, get_recommended_throughput_target_gbps

    tls = urlsplit(endpoint).scheme == "https"
    group = EventLoopGroup()
    return S3Client(
        bootstrap=ClientBootstrap(group, DefaultHostResolver(group)),
        region="unused",  # that is for signing
        tls_mode=S3RequestTlsMode.ENABLED if tls else S3RequestTlsMode.DISABLED,
        throughput_target_gbps=get_recommended_throughput_target_gbps() or 10.0,
    )
