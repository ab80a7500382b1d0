"""The GPU kernels, compiled for GPUs that are not here: none spills, all fit, products have matrix instructions.

The committed table says the same, and another number of tokens compiles nothing again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import kernel_resources  # noqa: E402
from kernel_resources import ARCHS, JOBS, SHAPES, faults, line, matrix, table  # noqa: E402

RECORD = json.loads((BENCHMARKS / "results/kernel_resources.json").read_text())
ROWS: list[dict[str, Any]] = RECORD["kernels"]
# Between them every job, every kernel of 16-bit and of float32 numbers, and the widest heads.
COMPILED = [(80, "Llama-3.1-8B"), (80, "Gemma-2-9B"), (90, "Llama-3.1-8B"), (90, "Qwen2.5-0.5B"), (100, "Llama-3.1-8B")]
ROW = {"kernel": "forward_kernel", "job": "attention", "shapes": ["x"], "arch": "sm_90", "registers": 128, "spilled": 0,
       "shared": 1000, "mma": 0, "wgmma": 8, "tcgen05": 0, "tma": 0}  # fmt: skip


def without_interpreter(code: str) -> Any:
    """What ``code`` prints as JSON in a process of its own: Triton is told once whether to compile or to interpret."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = f"import json, sys; sys.path.insert(0, {str(BENCHMARKS)!r})"
    command = [sys.executable, "-W", "ignore", "-c", f"{path}\n{code}"]
    done = subprocess.run(command, env=plain, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "shape"), COMPILED)
def test_compiled_kernels_are_as_the_table_says(arch: int, shape: str) -> None:
    code = f"import kernel_resources as k; print(json.dumps(k.measured([{shape!r}], [{arch}])))"
    found = without_interpreter(code)
    assert len(found) >= 10
    for row in found:
        assert faults(row) == [], row
        committed = [
            other
            for other in ROWS
            if all(row[name] == other[name] for name in ("kernel", "job", "arch")) and shape in other["shapes"]
        ]
        assert [matrix(other) for other in committed] == [matrix(row)], row


def test_another_number_of_tokens_or_rows_compiles_nothing_again() -> None:
    code = """
from kernel_resources import SHAPES, attention, divergence, log_probs
from triton_launches import launches
def keys(n, shape):
    def run():
        attention(shape, backward=False, tokens=n), attention(shape, backward=True, tokens=n)
        log_probs(shape, backward=True, rows=n), divergence(shape, backward=True, rows=n)
    return sorted({(launch.kernel, launch.key) for launch in launches(run, 90)})
names = "Llama-3.1-8B", "Gemma-2-9B"
print(json.dumps([[keys(n, SHAPES[name]) for n in (4096, 1, 2, 15, 16, 17, 4100)] for name in names]))
"""
    plain, windowed = without_interpreter(code)
    assert len(plain[0]) == len(windowed[0]) == 7
    assert plain[0] != windowed[0]
    for sizes in (plain, windowed):
        assert all(keys == sizes[0] for keys in sizes)


def test_table_holds_every_job_on_every_chip_without_a_fault() -> None:
    assert [(row, faults(row)) for row in ROWS if faults(row)] == []
    found = {(row["job"], shape, row["arch"]) for row in ROWS for shape in row["shapes"]}
    assert found >= {(job, shape, f"sm_{arch}") for job in JOBS for shape in SHAPES for arch in ARCHS}
    assert found >= {("row pass of a cluster", "any", arch) for arch in kernel_resources.CUDA_ARCHS}
    assert set(RECORD["versions"]) == {"triton", "nvcc"}


def test_document_shows_the_table() -> None:
    document = (BENCHMARKS / "GPU.md").read_text()
    assert "\n".join(table(ROWS)) in document
    assert all(f"{name} {version}" in document for name, version in RECORD["versions"].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 227 * 1024 + 1}, "takes 232449 bytes of shared memory of 232448"),
        ({"arch": "sm_80", "shared": 164 * 1024}, "takes 167936 bytes of shared memory of 166912"),
        ({"wgmma": 0}, "has no matrix instruction"),
    ],
)
def test_faults_are_named(change: dict[str, Any], message: str) -> None:
    assert faults(ROW) == []
    assert faults(ROW | change) == [message]


def test_exact_float32_products_need_no_matrix_instruction() -> None:
    assert faults(ROW | {"wgmma": 0, "shapes": ["x in float32"]}) == []


def test_line_of_the_table() -> None:
    row = ROW | {"mma": 3, "tma": 2, "shapes": ["x", "y"]}
    kinds = "3 mma.sync, 8 wgmma.mma_async"
    assert line(row) == f"| forward_kernel | attention | x, y | sm_90 | 128 | 0 | 1000 | {kinds} | 2 |"
