"""Options and the closing table of the hardware matrix."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lmi_multi import backends
from tests import moto_server
from tests.matrix import CELLS, Cell, Outcome
from tests.moto_server import Moto
from tests.serve.running import Running, serving

# Tiny models gain nothing from threads, and threads that wait for each other on a busy machine
# make tests slow.
torch.set_num_threads(1)

# An example that takes long is the machine's doing: tests of speed count work.
settings.register_profile("lmi_multi", settings(), deadline=None)
settings.load_profile("lmi_multi")

# Shells start background jobs with SIGINT ignored, and children inherit that: the tests of Ctrl-C
# need it as a terminal has it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache, nor does a fixture that serves several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMI_MULTI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session keeps its tiny checkpoints."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`lmi-multi serve demo`, for tests that leave it as it is."""
    with serving(tmp_path_factory.mktemp("demo-server"), "demo") as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    """moto's server; `aws` is what a test wants."""
    with moto_server.serve() as server:
        yield server


@pytest.fixture
def aws(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> Moto:
    """An empty AWS, and credentials for it in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    moto.reset()
    return moto


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        metavar="NAME",
        help="run only the hardware matrix's cells of this backend",
    )


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(_cell(item), "backend", None) == "cuda":
            item.add_marker("cuda")
    wanted = config.getoption("--backend")
    if not wanted:
        return
    if wanted not in backends.MODULES:
        raise pytest.UsageError(
            f"--backend is {wanted!r}, must be one of {', '.join(backends.MODULES)}"
        )
    keep = [item for item in items if getattr(_cell(item), "backend", None) == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(keep)])
    items[:] = keep


def _cell(item: pytest.Item) -> Cell | None:
    """The cell of the matrix that a test runs in; None for other tests."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("cell")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note what became of every cell of the matrix."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    cell = _cell(item)
    if cell is None or not (report.when == "call" or report.outcome != "passed"):
        return
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    entry = [*astuple(cell), report.outcome, reason.removeprefix("Skipped: ")]
    report.user_properties.append(("cell", entry))  # plain data: it may come from another process


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect them where the table is printed."""
    for name, value in report.user_properties:
        if name == "cell" and isinstance(value, list) and report.when in ("setup", "call"):
            *cell, outcome, reason = value
            CELLS.append(Outcome(Cell(*cell), outcome, reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The matrix as a table: backend and dtype by degree, then why cells were skipped."""
    if not CELLS:
        return
    terminalreporter.section("hardware matrix")
    groups: dict[tuple[str, str, int], Counter[str]] = {}
    for outcome in CELLS:
        key = (outcome.cell.backend, outcome.cell.dtype, outcome.cell.degree)
        groups.setdefault(key, Counter())[outcome.result] += 1
    head = f"{'backend':10}{'dtype':8}{'degree':>6}{'families':>10}{'passed':>8}{'failed':>8}"
    terminalreporter.write_line(head + f"{'skipped':>9}")
    for (backend, dtype, degree), counts in sorted(groups.items()):
        families = len({o.cell.family for o in CELLS if _key(o) == (backend, dtype, degree)})
        line = f"{backend:10}{dtype:8}{degree:>6}{families:>10}{counts['passed']:>8}"
        terminalreporter.write_line(line + f"{counts['failed']:>8}{counts['skipped']:>9}")
    for reason, count in Counter(o.reason for o in CELLS if o.reason).most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


def _key(outcome: Outcome) -> tuple[str, str, int]:
    return outcome.cell.backend, outcome.cell.dtype, outcome.cell.degree
