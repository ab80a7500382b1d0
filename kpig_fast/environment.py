"""What a result depends on besides the code's arguments: versions and hardware. No user names, paths or variables."""

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("kpig-fast", "torch", "transformers", "accelerate", "peft", "datasets", "triton", "numpy", "safetensors")


def environment() -> dict[str, Any]:
    """Versions of Python and the packages that matter, processor, CPU kernels, memory in GiB, GPUs and GPU kernels."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cpu_kernels": _cpu_kernels(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "gpu_kernels": _gpu_kernels(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cpu_kernels() -> dict[str, str]:
    # First, so that the kernels find its threads.
    import torch  # noqa: F401

    from kpig_fast import _native

    return {"instruction_set": _native.isa_name(), "threads_from": _native.thread_source()}


def _gpu_kernels() -> dict[str, Any]:
    from kpig_fast import _native

    return {"cuda": _native.cuda_architectures(), "triton": importlib.util.find_spec("triton") is not None}


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
