"""Row passes over the vocabulary by the kernels of csrc/cuda, on GPUs with clusters of thread blocks.

``z`` [n, V] raw products in float32; ``transform`` (bias, softcap, logit_scale) makes them logits.
``gradient``, if one is wanted: the upstream gradient [n], and where to write the gradient by ``z`` [n, V], in float32
or half precision: each row from where the row of ``z`` starts.
A cluster reads a row of ``z``, and for a divergence that of the reference, once, and writes the gradient once.
"""

import torch
from torch import Tensor

from kpig_fast import _native

# The first compute capability with clusters, and the elements to a multiple of which rows must be apart.
CLUSTERS, ROW_ELEMENTS = (9, 0), 64

Transform = tuple[Tensor | None, float | None, float]
Gradient = tuple[Tensor, Tensor] | None


def refusal(z: Tensor, sides: int) -> str | None:
    """Why no kernel takes rows like those of ``z``, of which ``sides`` are taken together; None if one does."""
    if z.device.type != "cuda" or z.dtype != torch.float32:
        return f"CUDA C++ takes float32 on a GPU, not {z.dtype} on {z.device.type}"
    architectures = _native.cuda_architectures()
    if not architectures:
        return "the native module was built without CUDA"
    toolkit, driver = _native.cuda_versions()
    if driver // 1000 < toolkit // 1000:
        return f"the native module was built with CUDA {_dotted(toolkit)}, and the driver runs up to {_dotted(driver)}"
    gpu = torch.cuda.get_device_properties(z.device)
    capability = (gpu.major, gpu.minor)
    if capability < CLUSTERS:
        return f"the GPU has compute capability {gpu.major}.{gpu.minor}, and clusters need 9.0"
    if not any(runs_on(architecture, capability) for architecture in architectures):
        return f"the native module was built for {' '.join(architectures)}, not for {gpu.major}.{gpu.minor}"
    if z.stride(1) != 1 or z.stride(0) % ROW_ELEMENTS:
        return f"rows are {z.stride(0)} elements apart, which is no multiple of {ROW_ELEMENTS}"
    if not _native.cuda_cluster_size(z.shape[1], sides, gpu.shared_memory_per_block_optin):
        return f"a cluster's shared memory has no room for {sides} x {z.shape[1]} logits"
    return None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU can run ``sm_90`` (its code) or ``compute_90`` (PTX); with an "a", only that very GPU can."""
    kind, number = architecture.split("_")
    major, minor = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return capability == (major, minor)
    same_family = capability[0] == major or (kind == "compute" and not number.endswith("f"))
    return same_family and capability >= (major, minor)


def logprob(z: Tensor, target: Tensor, transform: Transform, out: Tensor, gradient: Gradient) -> None:
    """Write log-probabilities to ``out`` [n]."""
    with torch.cuda.device(z.device):
        _native.logprob_rows_cuda(
            _rows(z, transform), _address(target), _gradient(z, gradient), _address(out), _stream(z)
        )


def jsd(
    z: Tensor,
    transform: Transform,
    r: Tensor,
    ref_transform: Transform,
    t: Tensor,
    out: Tensor,
    gradient: Gradient,
) -> None:
    """Write divergences to ``out`` [n]."""
    with torch.cuda.device(z.device):
        _native.jsd_rows_cuda(
            _rows(z, transform), _rows(r, ref_transform), _address(t), _gradient(z, gradient), _address(out), _stream(z)
        )


def _rows(z: Tensor, transform: Transform) -> tuple[int, int, int, int, int, float, float]:
    bias, softcap, scale = transform
    assert z.stride(1) == 1
    assert z.data_ptr() % 16 == 0
    return z.data_ptr(), z.shape[0], z.shape[1], z.stride(0), _address(bias), scale, softcap or 0.0


def _gradient(z: Tensor, gradient: Gradient) -> tuple[int, str]:
    if gradient is None:
        return 0, "float32"
    upstream, dz = gradient
    assert dz.data_ptr() == z.data_ptr()
    assert dz.stride(0) * dz.element_size() == z.stride(0) * z.element_size()
    return _address(upstream), str(dz.dtype).removeprefix("torch.")


def _address(x: Tensor | None) -> int:
    assert x is None or x.is_contiguous()
    return 0 if x is None else x.data_ptr()


def _stream(z: Tensor) -> int:
    return torch.cuda.current_stream(z.device).cuda_stream
