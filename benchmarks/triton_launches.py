"""What a launcher launches, compiled for a GPU that need not be there.

The launchers run on tensors of the meta device, which have a shape and no memory. Each launch is caught where Triton
would compile it: so block sizes, warps and what is known of every argument are the launcher's own.
Triton must not have been imported with ``TRITON_INTERPRET`` set.
"""

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What matrix and bulk-copy instructions are called in PTX: before Hopper, on it, on Blackwell; TMA.
INSTRUCTIONS = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "tma": "cp.async.bulk"}
REPORT = re.compile(
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
OPTIONS = "num_warps", "num_ctas", "num_stages", "enable_fp_fusion"


@dataclass(frozen=True)
class Launch:
    """A kernel as its launcher asked for it; launches of equal ``key`` are compiled once in a process."""

    kernel: str
    key: str
    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]

    def resources(self) -> dict[str, int]:
        """Registers of a thread, bytes that it spills, bytes of a block's shared memory, instructions in the code."""
        said = io.StringIO()
        with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(said):
            # The assembler's report, which a kernel from Triton's cache would not have.
            knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
            compiled: Any = triton.compile(self.source, target=self.target, options=self.options)
        found = REPORT.search(said.getvalue())
        assert found is not None, said.getvalue()
        spilled, registers = max(int(found["stores"]), int(found["loads"])), int(found["registers"])
        counts = {name: compiled.asm["ptx"].count(text) for name, text in INSTRUCTIONS.items()}
        return {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared} | counts


class Chip:
    """Stands in for Triton's driver: one GPU of compute capability ``arch`` / 10."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Triton keeps what it knows of a kernel for each device."""
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        """Nothing is launched on it."""
        return 0


def launches(call: Callable[[], object], arch: int) -> list[Launch]:
    """Run ``call`` on tensors of the meta device; the kernels that it would have launched, in order."""
    found: list[Launch] = []

    def catch(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        (attributes,) = compile["configs"]
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], attributes)
        options = {name: compile[name] for name in OPTIONS}
        found.append(Launch(fn.name, str(key), source, GPUTarget("cuda", arch, 32), options))
        # Neither compile nor launch.
        return True

    triton.runtime.driver.set_active(Chip(arch))  # type: ignore[arg-type]
    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, catch
    try:
        call()
    finally:
        knobs.runtime.jit_cache_hook = before
    return found
