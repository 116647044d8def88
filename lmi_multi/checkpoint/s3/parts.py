"""A file that comes in parts, and remembers across processes which of them it has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Lock

from lmi_multi.checkpoint.s3.listing import Object

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def journal_of(path: Path) -> Path:
    """Where `path`'s parts are noted while it is incomplete."""
    return path.with_name(f".{path.name}.parts")


class PartFile:
    """The local file of one object, filled part by part, in any order, by any thread.

    A journal beside it holds a line for each part that is there. It begins with what it is true
    for: the object's ETag and size, the size of a part, and this boot of the machine, for what was
    written before a crash of the machine may never have reached the disk.
    """

    def __init__(self, path: Path, item: Object, part_size: int) -> None:
        self.path, self.item, self.part_size = path, item, part_size
        self._journal = journal_of(path)
        self._count = -(-item.size // part_size)
        self._lock = Lock()
        mark = {"etag": item.etag, "size": item.size, "part": part_size, "boot": _boot()}
        self._done = self._read(mark)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        os.truncate(self._file, item.size)
        if not self._done:
            self._journal.write_text(json.dumps(mark) + "\n")
        self._notes = os.open(self._journal, os.O_WRONLY | os.O_APPEND)

    def _read(self, mark: dict[str, object]) -> set[int]:
        """The parts noted by an earlier attempt at the same object; else what is there goes."""
        try:
            # What follows the last newline was cut off by a kill.
            head, *lines = self._journal.read_text().split("\n")[:-1]
            if json.loads(head) == mark and self.path.stat().st_size == self.item.size:
                return {int(line) for line in lines} & set(range(self._count))
        except (OSError, ValueError):
            pass  # none there, or unreadable: begin anew
        self.path.unlink(missing_ok=True)
        return set()

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The byte ranges [start, stop) that are still to come."""
        size, total = self.part_size, self.item.size
        wanted = [number for number in range(self._count) if number not in self._done]
        return [(number * size, min((number + 1) * size, total)) for number in wanted]

    def write(self, offset: int, data: bytes) -> None:
        """Put `data` at byte `offset`."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file, view, offset)
            view, offset = view[count:], offset + count

    def note(self, start: int) -> bool:
        """The part that begins at byte `start` is there; returns whether it was the last one."""
        number = start // self.part_size
        with self._lock:
            os.write(self._notes, f"{number}\n".encode())
            self._done.add(number)
            return len(self._done) == self._count

    def close(self) -> None:
        """Close; what is there stays for the next attempt."""
        os.close(self._file)
        os.close(self._notes)


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:  # not Linux
        return ""
