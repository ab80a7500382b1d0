"""What the GPU kernels need of a chip: registers, spills, shared memory, matrix instructions. No GPU is needed.

``python benchmarks/kernel_resources.py --out benchmarks/results/kernel_resources.json`` compiles every kernel for
sm_80, sm_90 and sm_100 at the shapes of public models, prints the table, and writes the record; GPU.md beside this file
says how to read it.
H, Hkv heads, d head size, D hidden size, V vocabulary, N response rows, T tokens of a tree.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton_launches import INSTRUCTIONS, Launch, launches

from kpig_fast.data.files import write_lines
from kpig_fast.ops import attention_triton, rows_triton, scoring_triton
from kpig_fast.ops.response_logprob import GPU_TILE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cuda_resources import SOURCES, nvcc, resources

ARCHS = 80, 90, 100
CUDA_ARCHS = "sm_80", "sm_90a"
# Bytes of shared memory that a block may use.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ROWS, TOKENS = 4096, 8192
# Multiprocessors of an H100; how the work is shared over them leaves the code as it is.
PROCESSORS = 132


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and which options its attention has."""

    heads: int
    kv_heads: int
    d: int
    hidden: int
    vocabulary: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    logit_softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "Llama-3.1-8B": Shape(32, 8, 128, 4096, 128256),
    "Llama-2-7B": Shape(32, 32, 128, 4096, 32000),
    "Qwen2.5-0.5B": Shape(14, 2, 64, 896, 151936),
    "phi-2": Shape(32, 32, 80, 2560, 51200),
    "Phi-3-mini": Shape(32, 32, 96, 3072, 32064, window=2047),
    "gpt-oss-20b": Shape(64, 8, 64, 2880, 201088, window=128, sinks=True),
    "Gemma-2-9B": Shape(16, 8, 256, 3584, 256000, window=4096, softcap=50.0, logit_softcap=30.0),
    "Llama-3.2-1B in float32": Shape(32, 8, 64, 2048, 128256, dtype=torch.float32),
    "Llama-2-7B in float32": Shape(32, 32, 128, 4096, 32000, dtype=torch.float32),
    "Gemma-2-9B in float32": Shape(
        16, 8, 256, 3584, 256000, window=4096, softcap=50.0, logit_softcap=30.0, dtype=torch.float32
    ),
}


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(sizes, dtype=dtype, device="meta")


def attention(s: Shape, *, backward: bool, tokens: int = TOKENS) -> None:
    """Launch the kernels of attention on a tree, one way."""
    q, out, grad, dq = (empty(tokens, s.heads, s.d, dtype=s.dtype).transpose(0, 1) for _ in range(4))
    k, v = (empty(tokens, s.kv_heads, s.d, dtype=s.dtype).transpose(0, 1) for _ in range(2))
    ends, positions = (empty(tokens, dtype=torch.int32) for _ in range(2))
    lse, delta = (empty(s.heads, tokens) for _ in range(2))
    options = s.d**-0.5, s.window, s.softcap
    if backward:
        attention_triton.backward(grad, q, k, v, out, lse, ends, positions, *options, dq, delta)
    else:
        sinks = empty(s.heads, dtype=s.dtype) if s.sinks else None
        attention_triton.forward(q, k, v, ends, positions, *options, sinks, out, lse)


def log_probs(s: Shape, *, backward: bool, rows: int = ROWS) -> None:
    """Launch the row pass of the cross-entropy."""
    z, target, out = empty(rows, s.vocabulary), empty(rows, dtype=torch.int64), empty(rows)
    rows_triton.logprob(z, target, (None, s.logit_softcap, 1.0), out, gradient(s, z) if backward else None)


def divergence(s: Shape, *, backward: bool, rows: int = ROWS) -> None:
    """Launch the row pass of the divergence."""
    z, r, t, out = empty(rows, s.vocabulary), empty(rows, s.vocabulary), empty(rows), empty(rows)
    transform = None, s.logit_softcap, 1.0
    rows_triton.jsd(z, transform, r, transform, t, out, gradient(s, z) if backward else None)


def gradient(s: Shape, z: Tensor) -> tuple[Tensor, Tensor]:
    """An upstream gradient, and where the gradient by ``z`` goes, as ``Head.gradient_of`` gives it."""
    return empty(len(z)), z if s.dtype == z.dtype else z.view(s.dtype)[:, : s.vocabulary]


def scoring(s: Shape, rows: int = ROWS) -> None:
    """Launch what scores without a gradient: one kernel where it is taken, else the pass over a tile."""
    target, state = empty(rows, dtype=torch.int64), [empty(rows) for _ in range(3)]
    transform = None, s.logit_softcap, 1.0
    if s.hidden <= scoring_triton.MAX_HIDDEN and s.dtype != torch.float32:
        hidden, weight = empty(rows, s.hidden, dtype=s.dtype), empty(s.vocabulary, s.hidden, dtype=s.dtype)
        scoring_triton.score(hidden, weight, target, transform, *state, PROCESSORS)
    else:
        rows_triton.score_tile(empty(rows, GPU_TILE[1]), 0, target, transform, *state)


JOBS: dict[str, Callable[[Shape], None]] = {
    "attention": partial(attention, backward=False),
    "attention, gradient": partial(attention, backward=True),
    "log-prob": partial(log_probs, backward=False),
    "log-prob, gradient": partial(log_probs, backward=True),
    "divergence": partial(divergence, backward=False),
    "divergence, gradient": partial(divergence, backward=True),
    "scoring": scoring,
}


def wanted(names: Sequence[str], archs: Sequence[int]) -> list[tuple[dict[str, Any], Launch]]:
    """Every kernel that a job at the named shapes launches, once where several shapes come to the same code."""
    found: dict[tuple[str, ...], tuple[dict[str, Any], Launch]] = {}
    for arch, job, name in product(archs, JOBS, names):
        for launch in launches(partial(JOBS[job], SHAPES[name]), arch):
            row = {"kernel": launch.kernel, "job": job, "arch": f"sm_{arch}", "shapes": []}
            row, _ = found.setdefault((f"{arch}", job, launch.kernel, launch.key), (row, launch))
            row["shapes"].append(name)
    return list(found.values())


def measured(names: Sequence[str], archs: Sequence[int]) -> list[dict[str, Any]]:
    """A row of the table for each Triton kernel."""
    kernels = tqdm(wanted(names, archs), desc="compiling", unit="kernel")
    return [row | launch.resources() for row, launch in kernels]


def measured_cuda() -> list[dict[str, Any]]:
    """A row for each kernel of csrc/cuda."""
    kernels = [kernel for source in SOURCES for arch in CUDA_ARCHS for kernel in resources(source, arch)]
    return [kernel | {"job": "row pass of a cluster", "shapes": ["any"]} for kernel in kernels]


def versions() -> dict[str, str]:
    """Of the compilers; registers depend on them."""
    said = subprocess.run([nvcc() or "nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return {"triton": triton.__version__, "nvcc": said.rpartition(", V")[2].split()[0]}


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: spills, too much shared memory, no matrix instruction where products are formed."""
    arch = int(row["arch"].removeprefix("sm_").rstrip("a"))
    found = []
    if row["spilled"]:
        found.append(f"spills {row['spilled']} bytes")
    if row["shared"] > SHARED_MEMORY[arch]:
        found.append(f"takes {row['shared']} bytes of shared memory of {SHARED_MEMORY[arch]}")
    if wants_matrix(row) and not matrix(row):
        found.append("has no matrix instruction")
    return found


def wants_matrix(row: dict[str, Any]) -> bool:
    """Whether a kernel forms products of half-precision matrices; exact float32 products have no instruction."""
    products = "forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "score_kernel"
    return row["kernel"] in products and not any("float32" in shape for shape in row["shapes"])


def matrix(row: dict[str, Any]) -> str:
    """Which matrix instructions the kernel has, by name."""
    return " ".join(name for name in ("mma", "wgmma", "tcgen05") if row.get(name))


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as lines of a Markdown table."""
    title = "| kernel | job | shapes | chip | registers | spilled | shared memory | matrix instructions | TMA |"
    return [title, "|" + " --- |" * 9, *map(line, rows)]


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    kinds = [f"{row[name]} {INSTRUCTIONS[name]}" for name in ("mma", "wgmma", "tcgen05") if row.get(name)]
    cells = (
        row["kernel"],
        row["job"],
        ", ".join(row["shapes"]),
        row["arch"],
        row["registers"],
        row["spilled"],
        row["shared"],
    )
    return "| " + " | ".join(map(str, (*cells, ", ".join(kinds) or "none", row.get("tma", 0)))) + " |"


def main(command: Sequence[str] | None = None) -> None:
    """Compile and print; ``command``: options, default those of the command line."""
    options = argparse.ArgumentParser(description="Registers, spills, shared memory and instructions of GPU kernels.")
    options.add_argument(
        "--archs", nargs="+", type=int, default=ARCHS, help="compute capabilities (default: %(default)s)"
    )
    options.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=SHAPES, metavar="SHAPE", help="models")
    options.add_argument("--out", type=Path, help="JSON file for the record; csrc/cuda is compiled for it, too")
    arguments = options.parse_args(command)
    rows = measured(arguments.shapes, arguments.archs)
    if arguments.out:
        rows += measured_cuda()
        write_lines(arguments.out, [json.dumps({"versions": versions(), "kernels": rows}, indent=1)])
    print("\n".join(table(rows)))
    for row in rows:
        for fault in faults(row):
            print(f"{row['kernel']} at {', '.join(row['shapes'])} on {row['arch']} {fault}", file=sys.stderr)


if __name__ == "__main__":
    main()
