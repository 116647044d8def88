"""What a run leaves behind: raw times, and figures that are computed from them."""

from __future__ import annotations

from statistics import median

from pydantic import BaseModel, ConfigDict

from benchmarks.machine import Load


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Strict):
    """What was asked for; `rounds` is how often every contender ran at each length."""

    device: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    rounds: int


class Case(_Strict):
    """One shape, dtype and batch.

    `first_seconds` and `all_seconds` hold every contender's raw times for 1 and for `new_tokens`
    new tokens, one a round. `step_bytes` is what a decode step must read. `agreement` is, for
    each peer, the share of tokens that equal ours.
    """

    shape: str
    dtype: str
    batch: int
    new_tokens: int
    step_bytes: int
    agreement: dict[str, float]
    first_seconds: dict[str, list[float]]
    all_seconds: dict[str, list[float]]
    load: Load

    def steps(self, name: str) -> list[float]:
        """Seconds a decode step, one figure a round: (t_n - t_1) / (n - 1)."""
        pairs = zip(self.first_seconds[name], self.all_seconds[name], strict=True)
        return [(whole - first) / (self.new_tokens - 1) for first, whole in pairs]

    def step(self, name: str) -> float:
        """Seconds a decode step, the median round."""
        return median(self.steps(name))

    def first(self, name: str) -> float:
        """Seconds to the first token, the median round."""
        return median(self.first_seconds[name])

    def tokens_per_second(self, name: str) -> float:
        """Decoded tokens a second over the batch."""
        return self.batch / self.step(name)


class Result(_Strict):
    """One run of `benchmarks.decode`. `contenders`: ours first, then the peers."""

    date: str
    command: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    settings: Settings
    contenders: list[str]
    bytes_per_second: float
    cases: list[Case]


def ratios(ours: list[float], peer: list[float]) -> list[float]:
    """How many times as fast as the peer we are, round by round, sorted."""
    return sorted(theirs / own for own, theirs in zip(ours, peer, strict=True))
