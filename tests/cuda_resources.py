"""What nvcc says that the CUDA kernels take, for GPUs that need not be there; prints one JSON object a kernel."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted(CSRC.glob("cuda/*.cu"))
KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def nvcc() -> str | None:
    """The compiler, or None where there is none."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def resources(source: Path, arch: str) -> list[dict]:
    """Compile for ``arch`` such as "sm_90a": of each kernel its name, registers a thread, bytes spilled, shared memory.

    Shared memory is what the kernel itself declares; a launch adds that of its slices.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["-std=c++20", "-O3", "-Xptxas", "-v", f"-arch={arch}", "-cubin", "-o", Path(folder, "out")]
        command = [nvcc() or "nvcc", *options, "-I", CSRC, source]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return parsed(done.stdout + done.stderr, arch)


def parsed(said: str, arch: str) -> list[dict]:
    """The kernels that ``-Xptxas -v`` reports, by name."""
    kernels = [
        {
            "kernel": readable(found["symbol"]),
            "arch": arch,
            "registers": int(found["registers"]),
            "spilled": max(int(found["stack"]), int(found["stores"]), int(found["loads"])),
            "shared": int(found["shared"] or 0),
        }
        for part in re.split(r"(?=ptxas info +: Compiling entry function)", said)
        if (found := KERNEL.search(part))
    ]
    return sorted(kernels, key=lambda kernel: kernel["kernel"])


def readable(symbol: str) -> str:
    """``jsd_kernel<float>`` of a mangled name: the last component of the name and its template argument."""
    name = re.search(r"\d(?=[a-z_]+_kernel)([a-z_]+)I(f|\d+(__\w+?))E", symbol)
    assert name, symbol
    return f"{name[1]}<{name[3] or 'float'}>"


if __name__ == "__main__":
    for arch in sys.argv[1].split(","):
        for source in SOURCES:
            for kernel in resources(source, arch):
                print(json.dumps(kernel), flush=True)
