"""Which release of the Neuron SDK is installed, and which runtime can use it.

The compiler's version tells the release: neuronx-cc 2.N belongs to SDK 2.(N + 5), in AWS's lists of
packages for 2.18.1, for 2.25 to 2.31 and for 2.33 ("Release content" of the Neuron documentation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

COMPILER = "neuronx-cc"
PACKAGES = (
    COMPILER,
    "torch-neuronx",
    "libneuronxla",
    "neuronx-distributed",
    "transformers-neuronx",
)
_RELEASE_OFFSET = 5

Fault = tuple[str, str]
"""What stands in the way, and one line that helps."""


@dataclass(frozen=True)
class Support:
    """A runtime, the minors `first` to `last` of SDK 2 that it is for, the packages of it that are
    needed and how their versions begin, and what to pin where another release is installed."""

    runtime: str
    first: int
    last: int
    packages: Mapping[str, str]
    pin: str

    @property
    def releases(self) -> str:
        """For people."""
        return f"SDK 2.{self.first} to 2.{self.last}"


SUPPORTED = (
    Support(
        "nxd",
        28,
        31,
        {"torch-neuronx": "2.9.", "neuronx-distributed": ""},
        "neuronx-cc==2.26.* torch-neuronx==2.9.* neuronx-distributed==0.19.* (SDK 2.31)",
    ),
    Support(
        "transformers_neuronx",
        21,
        25,
        {"torch-neuronx": "", "transformers-neuronx": ""},
        "neuronx-cc==2.20.* transformers-neuronx==0.13.* (SDK 2.25)",
    ),
)


@dataclass(frozen=True)
class Sdk:
    """The installed packages of the SDK, by name."""

    versions: Mapping[str, str]

    @property
    def release(self) -> int | None:
        """N of SDK 2.N; None where no compiler is installed, or one of another numbering."""
        major, _, rest = self.versions.get(COMPILER, "").partition(".")
        minor = rest.partition(".")[0]
        return int(minor) + _RELEASE_OFFSET if major == "2" and minor.isdigit() else None

    def runtime(self) -> str | None:
        """The runtime that this release is for; None if there is none."""
        found = (s.runtime for s in SUPPORTED if self.fault(s.runtime) is None)
        return next(found, None)

    def fault(self, runtime: str = "") -> Fault | None:
        """Why `runtime`, or without a name any, cannot use this SDK; None if it can."""
        wanted = [s for s in SUPPORTED if runtime in ("", s.runtime)]
        pin = f"install {wanted[0].pin} from AWS's package repository"
        if COMPILER not in self.versions:
            return f"the Neuron SDK is not installed ({COMPILER} is missing)", pin
        if self.release is None:
            return f"{COMPILER} {self.versions[COMPILER]} belongs to no known SDK 2", pin
        near = [s for s in wanted if s.first <= self.release <= s.last]
        if not near:
            return self._wrong_release(wanted), pin
        lacking = [
            f"{name}=={start}*" if start else name
            for name, start in near[0].packages.items()
            if name not in self.versions or not self.versions[name].startswith(start)
        ]
        if not lacking:
            return None
        listed = ", ".join(lacking)
        release = f"SDK 2.{self.release}"
        return f"{near[0].runtime} needs {listed} on {release}", f"install {listed} of {release}"

    def _wrong_release(self, wanted: Sequence[Support]) -> str:
        release = self.release or 0
        judged = [
            f"too {'old' if release < s.first else 'new'} for {s.runtime} ({s.releases})"
            for s in wanted
        ]
        return f"SDK 2.{release} is {' and '.join(judged)}"


def installed() -> Sdk:
    """What this environment has."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return Sdk(found)
