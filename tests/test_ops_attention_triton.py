"""The Triton kernels of attention, interpreted on the CPU, against float64; and compiled for GPUs that are not here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import arrays, attention_inputs, random_parents, run, tree_attention_reference
from ops_cases import ops_module, relative

from kpig_fast.ops import tree_attention

triton = pytest.importorskip("triton")
attention_triton = pytest.importorskip("kpig_fast.ops.attention_triton")

# Bytes of shared memory that a program may use.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

VARIANTS = [
    {},
    {"window": 5},
    {"softcap": 2.0},
    {"sinks": True},
    {"scale": 0.1, "window": 40, "softcap": 3.0, "sinks": True},
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the Triton kernels."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setattr(ops_module("tree_attention"), "path_of", lambda q, v: attention_triton)


def assert_exact(tokens: int, options: dict, **sizes: int) -> None:
    """float32 errs at most twice (gradients: three times) as far from float64 as the reference in float32."""
    inputs = attention_inputs(tokens, sinks=options.get("sinks", False), **sizes)
    parents, options = random_parents(tokens, tokens), {k: v for k, v in options.items() if k != "sinks"}
    exact = run(tree_attention_reference, inputs, parents, torch.float64, **options)
    own = run(tree_attention_reference, inputs, parents, torch.float32, **options)
    found = run(tree_attention, inputs, parents, torch.float32, **options)
    assert set(found) == {"out", *inputs}
    for name, truth in exact.items():
        allowed = (2 if name == "out" else 3) * float((own[name] - truth).abs().max())
        # Terms of size 4 cancel in the gradient of a token that sees itself alone.
        allowed += 2 * 2**-23 * max(4, float(truth.abs().max()))
        assert float((found[name] - truth).abs().max()) <= allowed, name


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 31, 33, 150])
def test_forests(tokens: int, options: dict) -> None:
    assert_exact(tokens, options)


@pytest.mark.parametrize(("d", "dv"), [(20, 33), (80, 80), (64, 128), (256, 16)])
def test_head_sizes(d: int, dv: int) -> None:
    assert_exact(70, {}, d=d, dv=dv)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
def test_head_groups(heads: int, kv_heads: int) -> None:
    assert_exact(70, {"window": 30}, heads=heads, kv_heads=kv_heads)


def test_no_token() -> None:
    found = run(tree_attention, attention_inputs(0), [], torch.float32)
    assert all(x.numel() == 0 for x in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in attention_inputs(200, sinks=True).items()}
    parents = random_parents(200, 4)
    found = run(tree_attention, inputs, parents, dtype)
    exact = run(tree_attention_reference, inputs, parents, torch.float64)
    rounding = torch.finfo(dtype).eps
    for name, x in found.items():
        assert x.dtype == dtype
        assert relative(x, exact[name]) < 2 * rounding


def test_a_window_beyond_32_bits_is_none() -> None:
    inputs, (ends, depths) = attention_inputs(40), arrays(random_parents(40, 1))
    plain = tree_attention(**inputs, subtree_end=ends, position_ids=depths)
    assert torch.equal(tree_attention(**inputs, subtree_end=ends, position_ids=depths, window=2**40), plain)


def test_only_the_result_is_written_and_nothing_else_is_read() -> None:
    tokens, heads, d = 50, 4, 20
    inputs, (ends, depths) = attention_inputs(tokens, heads=heads, d=d, dv=d), arrays(random_parents(tokens, 3))

    def banded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` [heads, T, size] inside a larger buffer of NaN, and the buffer."""
        buffer = torch.full([x.shape[0] + 2, x.shape[1] + 7, x.shape[2] + 5], math.nan)
        inside = buffer[1:-1, 3:-4, 2:-3]
        return inside.copy_(x), buffer

    q, k, v = (banded(inputs[name])[0] for name in "qkv")
    out, out_buffer = banded(torch.full((heads, tokens, d), math.nan))
    lse = torch.full((heads, tokens), math.nan)
    attention_triton.forward(q, k, v, ends, depths, d**-0.5, None, None, None, out, lse)
    expected = tree_attention_reference(*(inputs[name].double() for name in "qkv"), ends, depths)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert int(out_buffer.isfinite().sum()) == out.numel()
    assert torch.isfinite(lse).all()
    grad, dq_buffer = banded(torch.ones(heads, tokens, d))[0], banded(torch.full((heads, tokens, d), math.nan))[1]
    dq, delta = dq_buffer[1:-1, 3:-4, 2:-3], torch.empty_like(lse)
    grads = attention_triton.backward(grad, q, k, v, out, lse, ends, depths, d**-0.5, None, None, dq, delta)
    assert all(x.isfinite().all() for x in (dq, *grads))
    assert int(dq_buffer.isfinite().sum()) == dq.numel()


def test_repeated_runs_give_the_same_bits() -> None:
    inputs, parents = attention_inputs(100, sinks=True), random_parents(100, 2)
    first = run(tree_attention, inputs, parents, torch.float32)
    again = run(tree_attention, inputs, parents, torch.float32)
    assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(SHARED_MEMORY))
def test_compiled_kernels_spill_nothing_fit_and_use_matrix_instructions(arch: int) -> None:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_ahead_of_time.py")), str(arch), "64,128"]
    done = subprocess.run(command, env=plain, check=True, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 6
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[arch], kernel
        assert kernel["matrix"] > 0, kernel
