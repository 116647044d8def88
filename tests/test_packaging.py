"""What an installation gets: the wheel, the source archive and the metadata."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A backend is a leaf that may import anything: looking for its files imports none of it.
LEAVES = ("cuda", "neuron")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, so that nothing left in the working folder is packed."""
    target = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    return target


def build(checkout: Path, kind: str, folder: Path) -> Path:
    """Call the build backend as an installer does; needs neither network nor other tools."""
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(checkout, "wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the source archive, below its one folder."""
    made = build(checkout, "sdist", tmp_path_factory.mktemp("sdist"))
    with tarfile.open(made) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(info(wheel, "METADATA")))


def info(wheel: zipfile.ZipFile, name: str) -> str:
    """The full name of a file in the wheel's dist-info folder."""
    (found,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return found


def modules(folder: Path, package: str) -> set[str]:
    """The Python files below `folder`, as they are called inside a wheel."""
    return {f"{package}/{file.relative_to(folder)}" for file in folder.rglob("*.py")}


def test_wheel_has_every_module(wheel: zipfile.ZipFile, checkout: Path) -> None:
    expected = modules(checkout / "lmi_multi", "lmi_multi")
    for leaf in LEAVES:
        expected |= modules(checkout / "backends" / leaf, f"lmi_multi/backends/{leaf}")
    assert {n for n in wheel.namelist() if n.endswith(".py")} == expected
    for leaf in LEAVES:
        assert f"lmi_multi/backends/{leaf}/__init__.py" in wheel.namelist()


def test_wheel_has_types_and_the_demo_model(wheel: zipfile.ZipFile, checkout: Path) -> None:
    names = set(wheel.namelist())
    assert "lmi_multi/py.typed" in names
    demo = {f"lmi_multi/demo/checkpoint/{f.name}" for f in demo_files(checkout)}
    assert {"lmi_multi/demo/checkpoint/config.json"} < demo <= names


def demo_files(checkout: Path) -> list[Path]:
    return list((checkout / "lmi_multi" / "demo" / "checkpoint").iterdir())


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert len(tops) == 2
    assert "lmi_multi" in tops
    assert not [n for n in wheel.namelist() if "test" in n or n.endswith((".pyc", ".so"))]
    assert sum(entry.file_size for entry in wheel.infolist()) < 10 * 2**20


def test_metadata(metadata: Message, wheel: zipfile.ZipFile) -> None:
    assert metadata["Name"] == "lmi_multi"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Apache License" in wheel.read(info(wheel, "licenses/LICENSE")).decode()
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert any(r.startswith("torch>=2.9") for r in required)


def test_entry_point(wheel: zipfile.ZipFile) -> None:
    points = wheel.read(info(wheel, "entry_points.txt")).decode()
    assert "lmi-multi = lmi_multi.cli.main:main" in points


def test_sdist_builds_the_same(sdist: set[str], checkout: Path) -> None:
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt"} <= sdist
    assert modules(checkout / "lmi_multi", "lmi_multi") <= sdist
    assert {f"backends/{leaf}/__init__.py" for leaf in LEAVES} <= sdist
    kernels = (checkout / "backends" / "cuda" / "csrc").iterdir()
    assert {"setup_kernels.py", *(f"backends/cuda/csrc/{f.name}" for f in kernels)} <= sdist
    assert {f"lmi_multi/demo/checkpoint/{f.name}" for f in demo_files(checkout)} <= sdist
    assert not [name for name in sdist if name.startswith("tests")]


def test_version_is_one(metadata: Message) -> None:
    import lmi_multi

    assert metadata["Version"] == lmi_multi.__version__


def test_constraints_pin_every_requirement(metadata: Message) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {plain(line) for line in lines if not line.startswith("#")}
    required = {plain(line) for line in metadata.get_all("Requires-Dist", [])} - {"lmi-multi"}
    assert len(required) > 15
    assert required <= pinned


def plain(requirement: str) -> str:
    """The normalized name that a requirement starts with."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def test_committed_files_name_no_address_of_an_index() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".pre-commit-config.yaml"):
        assert "://" not in (ROOT / name).read_text()
