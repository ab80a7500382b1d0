"""Compiles the Triton kernels of attention for GPUs that need not be there; prints one JSON object a kernel."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kpig_fast.ops import attention_triton as launcher
from kpig_fast.ops import attention_triton_kernels as kernels

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
FLOATS = {"q", "k", "v", "out", "grad", "dq", "sinks"}
SUMS = {"lse", "delta", "dk", "dv_out"}
TABLES = {"ends", "positions", "full", "n_full", "partial", "n_partial"}


def argument_type(name: str) -> str:
    """Triton's type of a kernel's argument, by its name, for bf16 inputs."""
    pointers = {**dict.fromkeys(FLOATS, "*bf16"), **dict.fromkeys(SUMS, "*fp32"), **dict.fromkeys(TABLES, "*i32")}
    return pointers.get(name) or ("fp32" if name in ("scale", "softcap") else "i32")


def compile_for(name: str, arch: int, d: int) -> dict:
    """Registers, spilled bytes, shared memory and matrix instructions of one kernel for head size ``d`` in bf16."""
    kernel = getattr(kernels, name)
    choose = launcher.key_blocks if name == "key_gradient_kernel" else launcher.query_blocks
    blocks = choose(d, torch.bfloat16)
    values = {"GROUPS": 4, "HAS_WINDOW": False, "HAS_SOFTCAP": False, "HAS_SINKS": False, "UPCAST": False}
    values |= {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_D": d, "BLOCK_DV": d}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in values else argument_type(n) for n in names}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n.startswith("stride")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(i,): values[n] for i, n in enumerate(names) if n in values},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": blocks.warps, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resource_usage(compiled.asm["cubin"])
    matrix = compiled.asm["ptx"].count(MATRIX[arch])
    return {"kernel": name, "arch": arch, "d": d, **usage, "shared": compiled.metadata.shared, "matrix": matrix}


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes that it spills to its stack."""
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()  # type: ignore[union-attr]
    return {"registers": int(registers), "spilled": int(stack)}


if __name__ == "__main__":
    for arch in map(int, sys.argv[1].split(",")):
        for d in map(int, sys.argv[2].split(",")):
            for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
                print(json.dumps(compile_for(name, arch, d)), flush=True)
