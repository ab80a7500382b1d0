"""The Triton kernels of attention, interpreted on the CPU, against float64."""

import math

import pytest
import torch
from attention_cases import arrays, attention_inputs, random_parents, run, tree_attention_reference
from ops_cases import ops_module, relative

from kpig_fast.ops import tree_attention

triton = pytest.importorskip("triton")
attention_triton = pytest.importorskip("kpig_fast.ops.attention_triton")

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
@pytest.mark.parametrize("tokens", [1, 31, 33, 70])
def test_forests(tokens: int, options: dict) -> None:
    assert_exact(tokens, options)


def use_blocks(monkeypatch: pytest.MonkeyPatch, m: int, n: int) -> None:
    """Blocks of ``m`` queries and ``n`` keys in all kernels."""
    for rule in ("forward_blocks", "query_blocks", "key_blocks"):
        monkeypatch.setattr(attention_triton, rule, lambda width, dtype: attention_triton.Blocks(m, n, 4))


@pytest.mark.parametrize("options", [{}, VARIANTS[-1]], ids=str)
@pytest.mark.parametrize(("m", "n"), [(128, 64), (128, 32), (64, 16), (16, 64), (32, 32)])
def test_blocks_of_any_size(m: int, n: int, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, m, n)
    assert_exact(200, options, heads=2, kv_heads=1)


def test_subtrees_longer_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole blocks lie between blocks seen in part, on both sides of a key block.
    use_blocks(monkeypatch, 16, 16)
    inputs, parents = attention_inputs(150, heads=2, kv_heads=1), [-1, *range(79), 39, *range(80, 149)]
    exact = run(tree_attention_reference, inputs, parents, torch.float64)
    for name, x in run(tree_attention, inputs, parents, torch.float32).items():
        assert relative(x, exact[name]) < 1e-6, name


@pytest.mark.parametrize("options", [{}, VARIANTS[-1]], ids=str)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (20, 33), (256, 16)])
def test_head_sizes(d: int, dv: int, options: dict) -> None:
    assert_exact(40, options, d=d, dv=dv, heads=2, kv_heads=1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
def test_head_groups(heads: int, kv_heads: int) -> None:
    assert_exact(70, {"window": 30}, heads=heads, kv_heads=kv_heads)


def test_no_token() -> None:
    found = run(tree_attention, attention_inputs(0), [], torch.float32)
    assert all(x.numel() == 0 for x in found.values())


@pytest.mark.parametrize("d", [8, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, d: int) -> None:
    inputs = {name: x.to(dtype) for name, x in attention_inputs(140, sinks=True, d=d, dv=d).items()}
    parents = random_parents(140, 4)
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
    inputs, parents = attention_inputs(50, sinks=True), random_parents(50, 2)
    first = run(tree_attention, inputs, parents, torch.float32)
    again = run(tree_attention, inputs, parents, torch.float32)
    assert all(torch.equal(x, again[name]) for name, x in first.items())


def far(x: torch.Tensor, *strides: int) -> torch.Tensor:
    """A copy of ``x`` [heads, T, size] with heads and tokens so far apart; memory between them is never touched."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1)))
    return x.new_empty(size).as_strided(x.shape, (*strides, 1)).copy_(x)


@pytest.mark.parametrize("strides", [(2**30 + 8, 8), (24, 2**30)], ids=["heads", "tokens"])
def test_offsets_beyond_32_bits(strides: tuple[int, int]) -> None:
    # The last of three lies 2^31 elements or more behind the first, though every stride fits into 32 bits.
    inputs, (ends, depths) = attention_inputs(3, heads=3, kv_heads=3), arrays([-1, 0, 0])
    q, k, v, grad, out, dq = (far(inputs[name].half(), *strides) for name in "qkvqqq")
    lse, delta = torch.empty(3, 3), torch.empty(3, 3)
    attention_triton.forward(q, k, v, ends, depths, 0.3, None, None, None, out, lse)
    dk, dv = attention_triton.backward(grad, q, k, v, out, lse, ends, depths, 0.3, None, None, dq, delta)
    leaves = [x.double().contiguous().requires_grad_() for x in (q, k, v)]
    exact = tree_attention_reference(*leaves, ends, depths, scale=0.3)
    grads = torch.autograd.grad(exact, leaves, grad.double())
    for found, truth in zip((out, dq, dk, dv), (exact.detach(), *grads)):
        assert relative(found, truth) < 2e-3


def test_lists_of_blocks_beyond_32_bits() -> None:
    tokens, columns = 48, 2**30
    ends, depths = arrays(list(range(-1, tokens - 1)))
    full, partial = (torch.empty(2 * columns + 3, dtype=torch.int32) for _ in range(2))
    n_full, n_partial = torch.empty(2, 3, dtype=torch.int32)
    attention_triton.visits_kernel[(3,)](
        ends, depths, full, n_full, partial, n_partial, tokens, 0, columns, False, 16, 16
    )  # fmt: skip
    assert n_full.tolist() == [0, 1, 2]
    assert n_partial.tolist() == [1, 1, 1]
    assert full[2 * columns : 2 * columns + 2].tolist() == [0, 1]
    assert int(partial[2 * columns]) == 2
