"""Kernels write their result and nothing else, and read nothing beyond their inputs, wherever in memory those lie."""

import pytest
import torch
from attention_cases import arrays, attention_inputs, random_parents
from attention_cases import upstream as attention_upstream
from ops_cases import Transform, head_inputs, jsd_inputs, run, targets, upstream
from torch import Tensor

from kpig_fast.ops import attention_cpu, linear_jsd, response_logprob, rows_cpu

DTYPES = [torch.float32, torch.float64]
COLUMNS = [1, 7, 16, 97, 1003]
TRANSFORMS = [(False, None, 1.0), (True, 2.5, 1.7)]
# Elements of every guard band: wider than a vector. With one more in front, no address is that of a whole vector.
BAND = 32

pytestmark = pytest.mark.usefixtures("isa")


def poison(x: Tensor) -> Tensor:
    """Fill with a NaN that no arithmetic makes; integers with an index far outside of everything."""
    if x.dtype == torch.float32:
        x.view(torch.int32).fill_(0x7FC0DEAD)
    elif x.dtype == torch.float64:
        x.view(torch.int64).fill_(0x7FF8DEADDEADDEAD)
    else:
        x.fill_(2**30)
    return x


class Guarded:
    """Copies of tensors inside of poisoned memory; ``untouched`` says whether the poison is still there."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []

    def flat(self, x: Tensor) -> Tensor:
        """A contiguous copy between two bands."""
        memory = poison(x.new_empty(x.numel() + 2 * BAND + 1))
        return self._keep(memory, memory[BAND + 1 : BAND + 1 + x.numel()].view(x.shape)).copy_(x)

    def heads(self, x: Tensor) -> Tensor:
        """A copy of [heads, T, size] that lies token after token, with a band after the row of each head."""
        heads, tokens, size = x.shape
        memory = poison(x.new_empty(tokens, heads, size + BAND + 1))
        return self._keep(memory, memory[:, :, 1 : 1 + size].transpose(0, 1)).copy_(x)

    def _keep(self, memory: Tensor, inside: Tensor) -> Tensor:
        self.copies.append((memory, inside))
        return inside

    def untouched(self) -> bool:
        for memory, inside in self.copies:
            written = inside.clone()
            poison(inside)
            same = torch.equal(memory.view(torch.uint8), poison(torch.empty_like(memory)).view(torch.uint8))
            inside.copy_(written)
            if not same:
                return False
        return True


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return poison(torch.empty(shape, dtype=dtype))


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def transform(given: tuple, columns: int, dtype: torch.dtype) -> Transform:
    bias, softcap, scale = given
    return (torch.linspace(-1, 1, columns, dtype=dtype) if bias else None, softcap, scale)


def guarded_transform(guarded: Guarded, given: Transform) -> Transform:
    bias, softcap, scale = given
    return (None if bias is None else guarded.flat(bias), softcap, scale)


def test_the_guard_sees_a_write_beside_the_result() -> None:
    for dtype in [*DTYPES, torch.int64]:
        guarded = Guarded()
        inside = guarded.flat(torch.ones(3, 5, dtype=dtype))
        assert guarded.untouched()
        inside.as_strided((1,), (1,), inside.storage_offset() + 15).fill_(0)
        assert not guarded.untouched()
        assert torch.equal(inside, torch.ones(3, 5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", TRANSFORMS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("train", [False, True])
def test_log_prob_rows(columns: int, given: tuple, dtype: torch.dtype, train: bool) -> None:
    n, head = 6, transform(given, columns, dtype)
    z, target = normal(n, columns, dtype=dtype), targets(n, columns)
    grad = upstream(n).to(dtype) if train else None
    guarded, plain = Guarded(), z.clone()
    out = torch.empty(n, dtype=dtype)
    rows_cpu.logprob(plain, target, head, out, None if grad is None else (grad, plain))
    z, where = guarded.flat(z), guarded.flat(poisoned(n, dtype=dtype))
    gradient = None if grad is None else (guarded.flat(grad), z)
    rows_cpu.logprob(z, guarded.flat(target), guarded_transform(guarded, head), where, gradient)
    assert guarded.untouched()
    assert torch.isfinite(out).all()
    assert torch.equal(where, out)
    if train:
        assert torch.isfinite(plain).all()
        assert torch.equal(z, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", TRANSFORMS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_score_tile(columns: int, given: tuple, dtype: torch.dtype) -> None:
    n, head = 6, transform(given, columns, dtype)
    z, target = normal(n, columns, dtype=dtype), targets(n, columns, ignored=False) + 40
    start = (torch.linspace(-9, 9, n), torch.linspace(0, 4, n), torch.full((n,), 0.5))
    plain = [x.to(dtype, copy=True) for x in start]
    rows_cpu.score_tile(z.clone(), 40, target, head, *plain)
    guarded = Guarded()
    state = [guarded.flat(x.to(dtype)) for x in start]
    rows_cpu.score_tile(guarded.flat(z), 40, guarded.flat(target), guarded_transform(guarded, head), *state)
    assert guarded.untouched()
    assert all(torch.isfinite(x).all() for x in plain)
    assert all(torch.equal(x, y) for x, y in zip(state, plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", TRANSFORMS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("train", [False, True])
def test_divergence_rows(columns: int, given: tuple, dtype: torch.dtype, train: bool) -> None:
    n, head = 6, transform(given, columns, dtype)
    z, r = normal(2, n, columns, dtype=dtype)
    t, grad = torch.linspace(0.5, 2, n, dtype=dtype), upstream(n).to(dtype) if train else None
    out, plain = torch.empty(n, dtype=dtype), z.clone()
    rows_cpu.jsd(plain, head, r.clone(), (None, None, 1.0), t, out, None if grad is None else (grad, plain))
    guarded = Guarded()
    z, r, t, where = (guarded.flat(x) for x in (z, r, t, poisoned(n, dtype=dtype)))
    gradient = None if grad is None else (guarded.flat(grad), z)
    rows_cpu.jsd(z, guarded_transform(guarded, head), r, (None, None, 1.0), t, where, gradient)
    assert guarded.untouched()
    assert torch.isfinite(out).all()
    assert torch.equal(where, out)
    if train:
        assert torch.isfinite(plain).all()
        assert torch.equal(z, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(16, 32), (80, 16), (5, 7)])
@pytest.mark.parametrize("tokens", [1, 65, 270])
def test_attention(tokens: int, d: int, dv: int, dtype: torch.dtype) -> None:
    inputs = attention_inputs(tokens, heads=4, kv_heads=2, d=d, dv=dv, sinks=True)
    *qkv, sinks = (x.to(dtype) for x in inputs.values())
    tree = arrays(random_parents(tokens, 1, jumps=0.02))
    options = (0.3, 50, 2.0)
    grad = attention_upstream(torch.empty(4, tokens, dv, dtype=dtype))

    def both(guarded: Guarded | None) -> list[Tensor]:
        results = [poisoned(4, tokens, size, dtype=dtype) for size in (dv, d)]
        rows = [poisoned(4, tokens, dtype=dtype) for _ in range(2)]
        given, ends, given_grad, given_sinks = qkv, tree, grad, sinks
        if guarded is not None:
            results, given = [guarded.heads(x) for x in results], [guarded.heads(x) for x in qkv]
            rows, ends = [guarded.flat(x) for x in rows], [guarded.flat(x) for x in tree]
            given_grad, given_sinks = guarded.heads(grad), guarded.flat(sinks)
        (out, dq), (lse, delta) = results, rows
        attention_cpu.forward(*given, *ends, *options, given_sinks, out, lse)
        dk, dvalue = attention_cpu.backward(given_grad, *given, out, lse, *ends, *options, dq, delta)
        return [out, lse, dq, delta, dk, dvalue]

    guarded = Guarded()
    plain, found = both(None), both(guarded)
    assert guarded.untouched()
    for x, y in zip(plain, found, strict=True):
        assert torch.isfinite(x).all()
        assert torch.equal(x, y)


def test_operators_take_inputs_at_any_address() -> None:
    guarded, grad, target = Guarded(), upstream(20), targets(20, 97)
    for op, inputs, fixed in (
        (response_logprob, head_inputs(20, 97, 9, bias=True), {"target": target}),
        (linear_jsd, jsd_inputs(20, 97, 9, bias=True), {}),
    ):
        wanted = ["hidden", "weight", "bias"]
        plain = run(op, inputs, grad, wanted, **fixed)
        moved = {name: guarded.flat(x) for name, x in inputs.items()}
        assert all(x.data_ptr() % 8 == 4 for x in moved.values())
        for name, x in run(op, moved, guarded.flat(grad), wanted, **fixed).items():
            torch.testing.assert_close(x, plain[name])
    assert guarded.untouched()
