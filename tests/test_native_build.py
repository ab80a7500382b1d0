"""How the native module is built: clear words where something is missing, and nothing of torch linked in."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from kpig_fast import _native

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup_script() -> dict:
    """The names that setup.py defines; it sets nothing up when it is not the main program."""
    pytest.importorskip("setuptools", minversion="77")
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_script")


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the build command with every output under ``tmp_path``."""
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path / "t", "--build-lib", tmp_path]
    keep = {name: value for name, value in os.environ.items() if name not in ("CXX", "PATH")}
    return subprocess.run(command, cwd=ROOT, env=keep | environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"PATH": ""}, "c++ or g++ or clang++"),
        ({"PATH": os.environ["PATH"], "CXX": "no-such-compiler -m64"}, "no-such-compiler"),
    ],
)
def test_missing_compiler_is_one_sentence_with_the_fix(tmp_path, environment, missing):
    done = build(tmp_path, **environment)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    sentence = next(line for line in said.splitlines() if "compiler" in line)
    assert f"found no {missing}:" in sentence
    assert "apt install g++" in sentence
    assert "set CXX" in sentence
    assert "Traceback" not in said
    assert "CMake" not in said
    assert not list(tmp_path.iterdir())


def test_missing_headers_are_one_sentence_with_the_fix(setup_script, monkeypatch, tmp_path):
    setup_script["check_headers"]()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(SystemExit, match=r"include/Python\.h does not exist: install them \(.*python3-dev"):
        setup_script["check_headers"]()


def test_a_compiler_with_a_launcher_is_accepted(setup_script, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} c++")
    setup_script["check_compiler"]()


def test_nvcc_is_looked_for_as_the_variable_says(setup_script, monkeypatch):
    present = {"nvcc": "/bin/nvcc", "/usr/local/cuda/bin/nvcc": "/usr/local/cuda/bin/nvcc", "/opt/nvcc": "/opt/nvcc"}
    find = setup_script["cuda_compiler"]
    monkeypatch.setattr(shutil, "which", present.get)
    monkeypatch.delenv("KPIG_BUILD_CUDA", raising=False)
    monkeypatch.setenv("CUDACXX", "/opt/nvcc")
    assert find() == "/opt/nvcc"
    monkeypatch.delenv("CUDACXX")
    assert find() == "/bin/nvcc"
    del present["nvcc"]
    assert find() == "/usr/local/cuda/bin/nvcc"
    monkeypatch.setenv("KPIG_BUILD_CUDA", "0")
    assert find() is None
    present.clear()
    monkeypatch.setenv("KPIG_BUILD_CUDA", "auto")
    assert find() is None


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("1", "KPIG_BUILD_CUDA=1, but there is no nvcc .*set CUDACXX"),
        ("yes", "KPIG_BUILD_CUDA is 'yes'; give 1 .*0 .*auto"),
    ],
)
def test_a_wish_for_cuda_that_cannot_be_met_is_one_sentence(setup_script, monkeypatch, value, sentence):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("KPIG_BUILD_CUDA", value)
    with pytest.raises(SystemExit, match=sentence):
        setup_script["cuda_compiler"]()


def test_cmake_and_the_source_distribution_know_every_source(setup_script):
    on_disk = {str(path.relative_to(ROOT)) for end in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{end}")}
    in_cmake = set(re.findall(r"csrc/\S+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    carried = setup_script["native_sources"]()
    assert on_disk == in_cmake
    assert on_disk < set(carried)
    assert {"CMakeLists.txt", "csrc/tree/forest.h"} < set(carried)
    assert all((ROOT / path).is_file() for path in carried)


def test_stub_declares_exactly_what_the_module_has():
    stub = ast.parse((ROOT / "kpig_fast" / "_native.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    constants = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    without_cuda = set() if _native.cuda_architectures() else {"logprob_rows_cuda", "jsd_rows_cuda"}
    assert without_cuda < declared
    assert declared - without_cuda | constants == {name for name in vars(_native) if not name.startswith("_")}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="lists loaded libraries through /proc")
def test_module_loads_without_torch():
    program = "import kpig_fast._native, sys; print('torch' in sys.modules); print(open('/proc/self/maps').read())"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    imported, maps = loaded.split("\n", 1)
    libraries = {Path(line.split()[-1]).name for line in maps.splitlines() if ".so" in line}
    assert imported == "False"
    assert Path(_native.__file__).name in libraries
    # Nor of CUDA, so that one module serves machines with a GPU and without.
    assert not [name for name in libraries if re.match(r"lib(torch|c10|cuda|cudart)\b", name)]
