"""The C++ tests under AddressSanitizer and UBSan, and what the kernels' objects leave to the linker."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kpig_fast import _native

ROOT = Path(__file__).resolve().parents[1]

cmake = pytest.importorskip("cmake")
ninja = pytest.importorskip("ninja")
pybind11 = pytest.importorskip("pybind11")


def succeed(program: str, *arguments: str | Path) -> str:
    """What one of CMake's programs prints; the test fails with all of it if the program does."""
    command = [Path(cmake.CMAKE_BIN_DIR, program), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def configure(folder: Path, *defines: str) -> None:
    tool = f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}"
    succeed("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", tool, *defines)


@pytest.mark.slow
def test_programs_pass_under_sanitizers(tmp_path: Path) -> None:
    configure(tmp_path, "-DKPIG_SANITIZE=ON")
    succeed("cmake", "--build", tmp_path)
    said = succeed("ctest", "--test-dir", tmp_path, "--output-on-failure")
    programs = {path.stem for path in (ROOT / "csrc/tests").glob("*.cpp")}
    assert all(f" {name}" in said for name in programs)
    assert "No tests were found" not in said


@pytest.mark.skipif(shutil.which("nm") is None, reason="reads symbols with nm")
def test_no_function_of_an_instruction_set_can_be_taken_for_that_of_another(tmp_path: Path) -> None:
    # The linker keeps one of several weak symbols of one name, which need not be one that the machine can run.
    python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure(tmp_path, "-DCMAKE_BUILD_TYPE=Release", *python)
    folders = (tmp_path / "CMakeFiles").glob("kernels_*.dir")
    isas = [folder.name.removeprefix("kernels_").removesuffix(".dir") for folder in folders]
    assert set(_native.supported_isas()) <= set(isas)
    succeed("cmake", "--build", tmp_path, "--target", *(f"kernels_{isa}" for isa in isas))
    for isa in isas:
        objects = list((tmp_path / f"CMakeFiles/kernels_{isa}.dir").rglob("*.o"))
        assert objects
        symbols = subprocess.run(["nm", "--defined-only", *objects], check=True, capture_output=True, text=True).stdout
        mergeable = [line.split()[-1] for line in symbols.splitlines() if line.split()[-2:-1] in (["W"], ["V"], ["u"])]
        assert mergeable
        # _ZZ: a lambda inside of such a function.
        assert [name for name in mergeable if not re.match(rf"_ZZ?N4kpig{len(isa)}{isa}", name)] == []
