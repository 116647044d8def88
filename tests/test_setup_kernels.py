"""How the kernels are compiled; no GPU and no nvcc needed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lmi_multi.backends.cuda import kernels

from benchmarks import registers
from benchmarks.registers import Compiled

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_kernels", ROOT / "setup_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compiles_for_every_target_without_warnings(setup: ModuleType) -> None:
    command = setup.compile_command(
        Path("nvcc"), Path("/torch"), Path("a.cu"), Path("a.o"), setup.ARCHS
    )
    for arch in ("80", "86", "89"):
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in command
    assert "-gencode=arch=compute_90,code=[sm_90,compute_90]" in command
    assert command[command.index("-Werror") + 1] == "all-warnings"
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000ULL" in command
    assert command[command.index("-c") + 1] == "a.cu"


def test_hoppers_own_instructions_are_compiled_for_hopper_alone(setup: ModuleType) -> None:
    source = Path("gemm_bfloat16.cu")
    own = setup.archs_of(source, setup.ARCHS)
    assert setup.targets(own) == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert setup.archs_of(source, ["80"]) == ["80"]  # nothing that anybody starts


def test_links_with_torch_and_not_with_python(setup: ModuleType) -> None:
    command = setup.link_command(Path("nvcc"), [Path("a.o")], Path("stubs"), Path("b.so"))
    assert {"-shared", "-ltorch_cpu", "-ltorch_cuda", "a.o"} <= set(command)
    assert not [option for option in command if "python" in option]


def test_what_is_built_wants_the_stable_abi_of_torch_alone() -> None:
    """Names are those of torch 2.10's; of Python's, and of torch's C++ classes, there are none."""
    if not kernels.LIBRARY.exists() or not shutil.which("nm"):
        pytest.skip("no library has been built, or there is no nm")
    listed = subprocess.check_output(["nm", "-D", "--undefined-only", kernels.LIBRARY], text=True)
    names = [line.split()[-1] for line in listed.splitlines()]
    ours = [name for name in names if "torch" in name or "c10" in name]
    assert ours
    assert not [name for name in ours if not name.startswith(("aoti_torch_", "torch_library_"))]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]


@pytest.mark.parametrize("archs", [["75"], ["sm_90"], ["90aa"], ["²90"], [""], []])
def test_refuses_unknown_architectures(setup: ModuleType, archs: list[str]) -> None:
    with pytest.raises(setup.BuildError, match="architecture"):
        setup.targets(archs)


def test_one_line_without_nvcc(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    target = tmp_path / "_kernels.so"
    for home, said in (
        ("", "nvcc was not found: install"),
        (str(tmp_path), "nvcc was not found in"),
    ):
        monkeypatch.setenv("CUDA_HOME", home)
        assert setup.main(["--output", str(target)]) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith(f"error: {said}")
        assert shown.err.count("\n") == 1
    assert not target.exists()


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Takes the compiler's place by a script of the shell."""

    def put(script: str) -> None:
        compiler = tmp_path / "bin" / "nvcc"
        compiler.parent.mkdir()
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return put


def test_a_failing_compiler_is_shown(
    setup: ModuleType,
    nvcc: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nvcc("echo 'what is wrong' >&2; exit 2")
    target = tmp_path / "_kernels.so"
    assert setup.main(["--output", str(target), "--arch", "90"]) == 1
    assert "what is wrong" in capsys.readouterr().err
    assert not target.exists()


def test_what_is_asked_for_is_checked_before_anything_is_compiled(
    setup: ModuleType, nvcc: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc("exit 0")
    assert setup.main(["--arch", "90", "--arch", "70"]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: an architecture (--arch, LMI_MULTI_CUDA_ARCHS) is '70', ")
    assert shown.err.endswith("must be 80 or above, such as 90\n") and shown.err.count("\n") == 1
    assert not shown.out
    with pytest.raises(SystemExit):
        setup.main(["--jobs", "0"])
    assert "argument --jobs: '0' is no number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_where_nothing_can_be_written_nothing_is_compiled(
    setup: ModuleType,
    nvcc: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    nvcc(f"touch {tmp_path}/compiled")
    for path in (tmp_path, tmp_path / "none" / "file"):
        assert setup.main([option, str(path)]) == 1
        shown = capsys.readouterr().err
        assert shown == f"error: {option} is '{path}', must be a file in a folder that exists\n"
    assert not (tmp_path / "compiled").exists()


def test_a_compiler_that_cannot_be_run(
    setup: ModuleType,
    nvcc: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nvcc("exit 0")
    (tmp_path / "bin" / "nvcc").write_text("no script")
    assert setup.main(["--output", str(tmp_path / "_kernels.so")]) == 1
    assert "nvcc cannot be run: Exec format error\n" in capsys.readouterr().err


def test_an_interruption_leaves_what_has_not_begun(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(command: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "_run", interrupt)
    monkeypatch.setattr(setup, "find_nvcc", lambda: Path("nvcc"))
    assert setup.main(["--output", str(tmp_path / "a.so"), "--jobs", "1"]) == 130
    shown = capsys.readouterr()
    assert shown.err == "interrupted\n"
    assert shown.out.count("compiling") < len([*setup.SOURCES.glob("*.cu")])


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{0}' for 'sm_80'
ptxas info    : Function properties for {0}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 80 bytes smem, 424 bytes cmem[0]
ptxas info    : Compiling entry function '{0}' for 'sm_90a'
ptxas info    : Function properties for {0}
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, 424 bytes cmem[0]
""".format(
    "_ZN3lmi41_GLOBAL__N__8023d323_9_greedy_cu_474f512213greedy_kernelIfEEvNS_12GreedyParamsE"
)


def test_what_ptxas_reports_is_read() -> None:
    assert [*registers.read(REPORT)] == [
        Compiled("greedy_kernel", "80", 32, 80, 0),
        Compiled("greedy_kernel", "90a", 255, 0, 20),
    ]
    assert registers.name("_Z6simplePf") == "simple"
    with pytest.raises(ValueError, match="no registers or no spills"):
        [*registers.read(REPORT.replace("Used 255 registers", ""))]
    shown = registers.table([*registers.read(REPORT), Compiled("greedy_kernel", "80", 40, 8, 0)])
    assert "| `greedy_kernel` | 80 | 2 | 40 | 80 | 0 |" in shown


def test_says_what_ptxas_made_slow(
    setup: ModuleType,
    nvcc: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nvcc(
        """
        case "$*" in *csrc/gemm_float16.cu*) echo "info: (C7518) Potential Performance Loss: \
            wgmma.mma_async instructions are serialized due to what" >&2 ;; esac
        while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done
        """
    )
    assert setup.main(["--output", str(tmp_path / "_kernels.so")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "compiling gemm_float16.cu for 90a" in said
    assert "compiling norm.cu for 80, 86, 89, 90" in said
    slow = [line for line in said if line.startswith("slow: ")]
    assert slow == [
        "slow: ptxas lets products wait for each other in gemm_float16.cu (--report)",
    ]


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80 86 89 90", (8, 0), True),
        ("80 86 89 90", (8, 6), True),
        ("80 86 89 90", (12, 0), True),  # PTX
        ("80", (8, 9), True),
        ("90", (8, 6), False),
        ("86 90", (8, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("80 90a", (10, 0), False),
        ("100", (9, 0), False),
    ],
)
def test_a_library_has_code_for_some_gpus(
    archs: str, capability: tuple[int, int], runs: bool
) -> None:
    assert kernels.has_code(archs.split(), capability) == runs


def test_a_library_of_other_gpus_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "_kernels.so"
    library.write_bytes(b"before\0lmi_multi is compiled for 89 90a\0behind")
    monkeypatch.setattr(kernels, "LIBRARY", library)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = []
    for capability in ((7, 5), (8, 6), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda own=capability: own)
        found.append(kernels.missing.__wrapped__())
    other = "built for sm_89, 90a, not for this GPU's sm_86 (make kernels)"
    assert found == ["for compute capability 8.0 and later", other, "", ""]


def test_what_is_built_says_for_what(setup: ModuleType) -> None:
    if not kernels.LIBRARY.exists():
        pytest.skip("no library has been built")
    assert set(kernels.built_for()) & set(setup.ARCHS)


def test_missing_kernels_have_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = kernels.missing.__wrapped__
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "_kernels.so")
    assert missing() == "not built (make kernels)"
    kernels.LIBRARY.write_text("no library")
    monkeypatch.setenv(kernels.SWITCH, "0")
    assert missing() == "switched off (LMI_MULTI_CUDA_KERNELS=0)"
    monkeypatch.delenv(kernels.SWITCH)
    assert missing().startswith("not loadable (")
