"""Named contents in order: `djl_python.pair_list`."""

from __future__ import annotations


class PairList:
    """Keys, some of which may be None or come twice, and their values."""

    def __init__(self) -> None:
        self._pairs: list[tuple[str | None, bytes]] = []

    def add(self, key: str | None, value: bytes) -> None:
        """Append a pair."""
        self._pairs.append((key, value))

    def get(self, key: str) -> bytes | None:
        """The first value with this key; None if there is none."""
        return next((value for own, value in self._pairs if own == key), None)

    def get_keys(self) -> list[str | None]:
        """All keys."""
        return [key for key, _ in self._pairs]

    def get_values(self) -> list[bytes]:
        """All values."""
        return [value for _, value in self._pairs]

    def key_at(self, index: int) -> str | None:
        """The key of pair `index`."""
        return self._pairs[index][0]

    def value_at(self, index: int) -> bytes:
        """The value of pair `index`."""
        return self._pairs[index][1]

    def size(self) -> int:
        """How many pairs there are."""
        return len(self._pairs)

    def is_empty(self) -> bool:
        """Whether there are none."""
        return not self._pairs
