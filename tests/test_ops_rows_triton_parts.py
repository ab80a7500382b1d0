"""Functions that the Triton row passes are made of, interpreted on the CPU."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("kpig_fast.ops.rows_triton_kernels")
tl = triton.language

# A row beyond 2^31 in a chunk of Qwen2.5's vocabulary.
FAR_ROW, STRIDE = 20000, 151936


@pytest.fixture(autouse=True)
def interpreted() -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")


@triton.jit
def offset_probe(out, first, stride):
    row = first + tl.program_id(0)
    tl.store(out, kernels.row_offset(row, stride))
    tl.store(out + 1, row * stride)


def test_offsets_of_rows_pass_32_bits() -> None:
    out = torch.zeros(2, dtype=torch.int64)
    offset_probe[(1,)](out, FAR_ROW, STRIDE)
    assert int(out[0]) == FAR_ROW * STRIDE > 2**31
    # Without the widening the product would have wrapped around, which the first line would have shown.
    assert int(out[1]) == FAR_ROW * STRIDE - 2**32


@triton.jit
def functions_probe(x, expm1, log_mean_exp, tanh, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(expm1 + at, kernels.expm1(value))
    tl.store(log_mean_exp + at, kernels.log_mean_exp(value))
    tl.store(tanh + at, kernels.tanh(value))


def test_elementary_functions_lose_nothing_near_zero() -> None:
    x = -torch.logspace(-30, 2, 4096)
    found = [torch.empty_like(x) for _ in range(3)]
    functions_probe[(1,)](x, *found, 4096)
    wide = x.double()
    for y, exact in zip(found, (wide.expm1(), (wide.expm1() / 2).log1p(), wide.tanh()), strict=True):
        assert float(((y - exact) / exact).abs().max()) < 3 * 2**-24


def test_elementary_functions_at_the_ends() -> None:
    x = torch.tensor([0.0, -88.0, -1e30, -math.inf, math.nan, 5.0, math.inf, 1e-20])
    expm1, log_mean_exp, tanh = (torch.empty_like(x) for _ in range(3))
    functions_probe[(1,)](x, expm1, log_mean_exp, tanh, 8)
    assert expm1[:4].tolist() == [0, -1, -1, -1]
    torch.testing.assert_close(log_mean_exp[:4], torch.tensor([0, *[-math.log(2)] * 3]))
    torch.testing.assert_close(tanh, x.tanh(), equal_nan=True)
    assert expm1.isnan().tolist()[4]
    assert log_mean_exp.isnan().tolist()[4]
