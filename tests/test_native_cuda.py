"""The CUDA kernels: what they take, compiled for GPUs that are not here; when they run; their results where one is."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_resources
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kpig_fast import _native
from kpig_fast.ops import rows_cuda, rows_torch

ROOT = Path(__file__).resolve().parents[1]
# Threads of a block, blocks of a multiprocessor, and its registers.
THREADS, BLOCKS, REGISTERS = 512, 2, 65536
# Bytes of shared memory that csrc/cuda/slices.hpp sets aside for what a kernel declares.
REDUCTIONS = 1024
KERNELS = [f"{name}_kernel<{type}>" for name in ("jsd", "logprob") for type in ("__half", "__nv_bfloat16", "float")]
H100 = {"major": 9, "minor": 0, "shared_memory_per_block_optin": 227 * 1024}

SAID = """
ptxas info    : Compiling entry function '_ZN4kpig4cuda39_GLOBAL__N__5272068c_7_rows_cu_9e15a29110jsd_kernelI6__halfEEv'
ptxas info    : Function properties for _ZN
    16 bytes stack frame, 24 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 304 bytes smem, 536 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN4kpig4cuda39_GLOBAL__N__5272068c_7_rows_cu_9e15a29114logprob_kernelIfEEv'
ptxas info    : Function properties for _ZN
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers
"""


def test_reports_are_read_to_the_letter() -> None:
    first, second = cuda_resources.parsed(SAID, "sm_90a")
    assert first == {
        "kernel": "jsd_kernel<__half>", "arch": "sm_90a", "registers": 64, "spilled": 24, "shared": 304
    }  # fmt: skip
    assert second == {
        "kernel": "logprob_kernel<float>", "arch": "sm_90a", "registers": 4, "spilled": 0, "shared": 0
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(cuda_resources.nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_compiled_kernels_spill_nothing_and_fit(arch: str) -> None:
    found = [kernel for source in cuda_resources.SOURCES for kernel in cuda_resources.resources(source, arch)]
    assert [kernel["kernel"] for kernel in found] == KERNELS
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] * THREADS * BLOCKS <= REGISTERS, kernel
        assert kernel["shared"] <= REDUCTIONS, kernel
        # Before 9.0 there are no clusters: all that such a kernel does is to trap.
        assert (kernel["shared"] > 0) == (arch != "sm_80"), kernel


@pytest.mark.parametrize(("wish", "code"), [("auto", 0), ("1", 1)])
def test_an_nvcc_that_does_not_work_ends_the_build_only_where_cuda_is_wished_for(
    tmp_path, wish: str, code: int
) -> None:
    cmake, ninja = pytest.importorskip("cmake"), pytest.importorskip("ninja")
    pybind11 = pytest.importorskip("pybind11")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    nvcc.chmod(0o755)
    options = {
        "KPIG_BUILD_CUDA": wish,
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR, "ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    command = [Path(cmake.CMAKE_BIN_DIR, "cmake"), "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, env={"CUDACXX": str(nvcc), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == code
    said = " ".join(done.stderr.split())
    assert ("CMake Error" in said) == (wish == "1")
    assert ("building without CUDA" in said) == (wish == "auto")
    assert "CUDAHOSTCXX" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.skipif(not _native.cuda_architectures(), reason="needs a module that was built with CUDA")
def test_without_a_driver_a_launch_is_an_error_in_cudas_words() -> None:
    toolkit, driver = _native.cuda_versions()
    assert toolkit >= 12080
    assert driver == 0
    with pytest.raises(RuntimeError, match=r"CUDA row passes of kpig_fast failed: .*(driver|device)"):
        _native.logprob_rows_cuda((0, 1, 64, 64, 0, 1.0, 0.0), 0, (0, "float32"), 0, 0)
    with pytest.raises(ValueError, match="no gradient of type float64"):
        _native.logprob_rows_cuda((0, 1, 64, 64, 0, 1.0, 0.0), 0, (0, "float64"), 0, 0)


def refusal(
    monkeypatch,
    built: str = "sm_90 compute_90",
    columns: int = 97,
    stride: int = 128,
    sides: int = 1,
    versions: tuple[int, int] = (12090, 12080),
    **gpu,
):
    """What rows on a GPU with the given properties are told; the H100's where they are not given."""
    monkeypatch.setattr(_native, "cuda_architectures", built.split)
    monkeypatch.setattr(_native, "cuda_versions", lambda: versions, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**(H100 | gpu)))
    with FakeTensorMode():
        return rows_cuda.refusal(torch.empty_strided((2, columns), (stride, 1), device="cuda"), sides)


def test_rows_are_taken(monkeypatch) -> None:
    assert refusal(monkeypatch) is None
    assert refusal(monkeypatch, columns=128256, stride=128256, sides=2) is None
    assert refusal(monkeypatch, major=10, minor=3) is None
    assert refusal(monkeypatch, major=12, shared_memory_per_block_optin=99 * 1024) is None


def test_a_refusal_says_why(monkeypatch) -> None:
    assert refusal(monkeypatch, built="") == "the native module was built without CUDA"
    said = "the native module was built with CUDA 13.0, and the driver runs up to 12.8"
    assert refusal(monkeypatch, versions=(13000, 12080)) == said
    assert refusal(monkeypatch, major=8) == "the GPU has compute capability 8.0, and clusters need 9.0"
    assert refusal(monkeypatch, built="sm_90", major=10) == "the native module was built for sm_90, not for 10.0"
    assert "97 elements apart, which is no multiple of 64" in str(refusal(monkeypatch, stride=97))
    # 57,856 columns of one side, half as many of two, fill a block's shared memory.
    assert refusal(monkeypatch, columns=8 * 28928, stride=8 * 28928, sides=2) is None
    said = refusal(monkeypatch, columns=8 * 28928 + 1, stride=8 * 28928 + 64, sides=2)
    assert said == "a cluster's shared memory has no room for 2 x 231425 logits"
    assert "not torch.float32 on cpu" in str(rows_cuda.refusal(torch.empty(2, 64), 1))


@pytest.mark.parametrize(
    ("architecture", "runs"),
    [
        ("sm_90", [(9, 0)]),
        ("compute_90", [(9, 0), (10, 0), (10, 3), (12, 0)]),
        ("sm_90a", [(9, 0)]),
        ("compute_90a", [(9, 0)]),
        ("sm_100", [(10, 0), (10, 3)]),
        ("sm_100f", [(10, 0), (10, 3)]),
        ("compute_100f", [(10, 0), (10, 3)]),
        ("compute_120", [(12, 0)]),
    ],
)
def test_what_code_runs_where(architecture: str, runs: list[tuple[int, int]]) -> None:
    gpus = [(8, 0), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert [gpu for gpu in gpus if rows_cuda.runs_on(architecture, gpu)] == runs


def device_rows(n: int, columns: int, seed: int) -> Tensor:
    """Products of a chunk as a driver lays them out: rows at multiples of 256 bytes, NaN between them."""
    space = torch.full((n, -(-columns // 64) * 64), torch.nan, device="cuda")
    generator = torch.Generator().manual_seed(seed)
    space[:, :columns] = 3 * torch.randn(n, columns, generator=generator).cuda()
    return space[:, :columns]


def gradient_of(z: Tensor, dtype: torch.dtype) -> Tensor:
    return z if dtype == z.dtype else z.view(dtype)[:, : z.shape[1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 97, 1003, 32001, 128256])
@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("name", ["logprob", "jsd"])
def test_results_on_a_gpu(name: str, bent: bool, columns: int, dtype: torch.dtype) -> None:
    n = 37
    sides = 1 if name == "logprob" else 2
    z, r = device_rows(n, columns, 1), device_rows(n, columns, 2)
    assert rows_cuda.refusal(z, sides) is None
    bias = torch.randn(columns, device="cuda") if bent else None
    transform = (bias, 2.5, 1.7) if bent else (None, None, 1.0)
    exact_transform = (None if bias is None else bias.double(), *transform[1:])
    target = torch.arange(n, device="cuda") * 31 % columns
    target[::5] = -100
    t, upstream = torch.linspace(0.5, 2, n, device="cuda"), torch.linspace(-2, 3, n, device="cuda")

    def run(module, z: Tensor, r: Tensor, transform, real: torch.dtype, dz: Tensor | None) -> Tensor:
        out = torch.full((n,), torch.nan, dtype=real, device="cuda")
        gradient = None if dz is None else (upstream.to(real), dz)
        if name == "logprob":
            module.logprob(z, target, transform, out, gradient)
        else:
            module.jsd(z, transform, r, transform, t.to(real), out, gradient)
        return out

    exact_z = z.double()
    exact = run(rows_torch, exact_z, r.double(), exact_transform, torch.float64, exact_z)
    own_z, again = z.clone(), device_rows(n, columns, 1)
    run(rows_torch, own_z, r.clone(), transform, torch.float32, own_z)
    silent = run(rows_cuda, again, r, transform, torch.float32, None)
    out = run(rows_cuda, z, r, transform, torch.float32, gradient_of(z, dtype))
    repeated = run(rows_cuda, again, r, transform, torch.float32, gradient_of(again, dtype))
    assert torch.equal(out, silent)
    assert torch.equal(out, repeated)
    assert torch.equal(gradient_of(z, dtype), gradient_of(again, dtype))
    torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6)
    found, numbers = gradient_of(z, dtype).double(), torch.finfo(dtype)
    # Three times the error of plain PyTorch, and that of rounding to `dtype`, also below its least normal number.
    allowed = 3 * (own_z - exact_z).norm() + numbers.eps * exact_z.norm()
    allowed += numbers.tiny * numbers.eps * exact_z.numel() ** 0.5
    assert (found - exact_z).norm() <= allowed
    if name == "logprob":
        assert (out[::5] == 0).all()
        assert (gradient_of(z, dtype)[::5] == 0).all()
