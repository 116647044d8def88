"""Fetches the missing parts of several files at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock

from lmi_multi.checkpoint.s3.parts import PartFile
from lmi_multi.checkpoint.s3.ranges import Transport, fetch
from lmi_multi.checkpoint.writer import Progress


class Pool:
    """Threads that take one part after the other; the first failure stops them all.

    `whole` is called, in a thread, with each file that has become whole.
    """

    def __init__(
        self,
        transport: Transport,
        whole: Callable[[PartFile], None],
        progress: Progress | None,
    ) -> None:
        self._transport, self._whole, self._progress = transport, whole, progress
        self._lock = Lock()
        self._done = self._total = 0

    def run(self, files: list[PartFile]) -> None:
        """Fill `files`. Raises what the transport or `whole` raises."""
        self._total = sum(file.item.size for file in files)
        missing = {file: file.missing for file in files}
        self._done = self._total - sum(b - a for parts in missing.values() for a, b in parts)
        with ThreadPoolExecutor(self._transport.threads, "s3") as threads:
            jobs = [
                threads.submit(self._part, file, start, stop)
                for file, parts in missing.items()
                for start, stop in parts
            ]
            jobs += [threads.submit(self._whole, f) for f, parts in missing.items() if not parts]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self._transport.stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _part(self, file: PartFile, start: int, stop: int) -> None:
        def sink(offset: int, data: bytes) -> None:
            file.write(offset, data)
            self._tell(len(data), file.item.name)

        fetch(self._transport, file.item, start, stop, sink)
        if file.note(start):
            self._whole(file)

    def _tell(self, count: int, name: str) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total, name)
