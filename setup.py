"""Builds the native module with CMake and ninja; everything else about the package stands in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def check_compiler() -> None:
    """SystemExit where CMake would find no C++ compiler: neither ``$CXX`` nor c++, g++ or clang++."""
    wanted = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, wanted)):
        sys.exit(
            f"kpig-fast needs a C++20 compiler, but found no {' or '.join(wanted)}: install one "
            "(Debian/Ubuntu: apt install g++, Fedora: dnf install gcc-c++, macOS: xcode-select --install) "
            "or set CXX to the path of one."
        )


def check_headers() -> None:
    """SystemExit where the headers of the running Python are missing."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        sys.exit(
            f"kpig-fast needs the headers of Python, but {header} does not exist: install them "
            "(Debian/Ubuntu: apt install python3-dev, Fedora: dnf install python3-devel)."
        )


def cuda_compiler() -> str | None:
    """The nvcc that builds the CUDA kernels, or None without them, as ``KPIG_BUILD_CUDA`` says: auto, 0 or 1.

    SystemExit where it says anything else, or 1 and there is no nvcc.
    """
    wanted = os.environ.get("KPIG_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"KPIG_BUILD_CUDA is {wanted!r}; give 1 to build the CUDA kernels, 0 not to, or auto where nvcc is.")
    if wanted == "0":
        return None
    places = filter(None, (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"))
    found = next(filter(None, map(shutil.which, places)), None)
    if wanted == "1" and found is None:
        sys.exit(
            "KPIG_BUILD_CUDA=1, but there is no nvcc in PATH or /usr/local/cuda/bin: install the CUDA toolkit, 12.8 or "
            "newer, or set CUDACXX to the path of nvcc."
        )
    return found


class CMakeBuild(build_ext):
    """Runs CMake where setuptools would call the compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build the module into the folder where setuptools expects it."""
        check_compiler()
        check_headers()
        nvcc = cuda_compiler()
        # The tools of build-system.requires; a source distribution is made without them.
        import cmake
        import ninja
        import pybind11

        run = Path(cmake.CMAKE_BIN_DIR, "cmake")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(self.build_temp).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR, "ninja"),
            "KPIG_BUILD_CUDA": os.environ.get("KPIG_BUILD_CUDA", "auto") if nvcc else "0",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if "KPIG_CUDA_ARCHS" in os.environ:
            options["CMAKE_CUDA_ARCHITECTURES"] = os.environ["KPIG_CUDA_ARCHS"]
        defines = [f"-D{name}={value}" for name, value in options.items()]
        environment = os.environ | ({"CUDACXX": nvcc} if nvcc else {})
        subprocess.run([run, "-S", ROOT, "-B", folder, "-G", "Ninja", *defines], check=True, env=environment)
        subprocess.run([run, "--build", folder], check=True)


def native_sources() -> list[str]:
    """What a source distribution must carry to build the module, relative to the project's root."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return ["CMakeLists.txt", *sorted(str(path.relative_to(ROOT)) for path in files)]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("kpig_fast._native", native_sources())],
        cmdclass={"build_ext": CMakeBuild},
    )
