"""The Triton row passes, interpreted on the CPU: by themselves, and below the operators, against float64."""

import math
from types import ModuleType

import pytest
import torch
from ops_cases import (
    TRANSFORMS,
    Transform,
    assert_as_exact_as_torch,
    head_inputs,
    jsd_inputs,
    ops_module,
    relative,
    run,
    targets,
    upstream,
    widened,
)
from test_ops_bounds import poison
from torch import Tensor
from triton_interpreted import touches_only

from kpig_fast.ops import linear_jsd, linear_kpig_loss, response_logprob, rows_torch
from kpig_fast.ops.reference import linear_jsd_reference, response_logprob_reference

triton = pytest.importorskip("triton")
rows_triton = pytest.importorskip("kpig_fast.ops.rows_triton")

WANTED = ["hidden", "weight"]
BOTH_SIDES = [*WANTED, "bias", "ref_hidden", "ref_weight", "ref_bias"]
# Ragged and whole blocks of 1024 columns, and both.
COLUMNS = [97, 2048, 2500]
HEADS: list[tuple[bool, float | None, float]] = [(False, None, 1.0), (True, 2.5, 1.7)]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 rows on the CPU take the Triton kernels, in tiles that fill whole blocks."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")

    def passes(z: Tensor, sides: int = 1) -> ModuleType:
        assert z.dtype == torch.float32
        return rows_triton

    for module, chosen in (
        ("response_logprob", "tile_passes"),
        ("response_logprob", "row_passes"),
        ("linear_jsd", "row_passes"),
    ):
        monkeypatch.setattr(ops_module(module), chosen, passes)
    monkeypatch.setattr(ops_module("response_logprob"), "CPU_TILE", (1024, 2048))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(given: tuple[bool, float | None, float], columns: int, dtype: torch.dtype = torch.float32) -> Transform:
    bias, softcap, scale = given
    return (torch.linspace(-1, 1, columns, dtype=dtype) if bias else None, softcap, scale)


def logprob(path: ModuleType, z: Tensor, transform: Transform, dz: Tensor | None) -> Tensor:
    """Log-probabilities [n] of ``path``; for a ``dz`` it also writes the gradient there."""
    out, target, grad = poison(torch.empty(len(z), dtype=z.dtype)), targets(*z.shape), upstream(len(z)).to(z.dtype)
    with touches_only(z, out, target, transform[0], grad, dz):
        path.logprob(z, target, transform, out, None if dz is None else (grad, dz))
    return out


def jsd(path: ModuleType, z: Tensor, transform: Transform, dz: Tensor | None) -> Tensor:
    """Divergences [n] of rows ``z`` from others, which have no bias and no cap."""
    n, columns = z.shape
    out, t = poison(torch.empty(n, dtype=z.dtype)), torch.linspace(0.5, 2, n, dtype=z.dtype)
    r, grad = normal(n, columns, seed=1).to(z.dtype), upstream(n).to(z.dtype)
    with touches_only(z, r, out, t, transform[0], grad, dz):
        path.jsd(z, transform, r, (None, None, 0.8), t, out, None if dz is None else (grad, dz))
    return out


# Operators whole


@pytest.mark.parametrize(
    ("n", "v", "d"), [(0, 97, 65), (1, 1, 1), (1, 97, 65), (63, 97, 65), (5, 1003, 9), (2, 32001, 5)]
)
def test_log_probs(n: int, v: int, d: int) -> None:
    fixed = {"target": targets(n, v, ignored=n > 2)}
    inputs, wanted = head_inputs(n, v, d, bias=n < 9), [*WANTED, "bias"] if n < 9 else WANTED
    assert_as_exact_as_torch(response_logprob, response_logprob_reference, inputs, upstream(n), wanted, **fixed)


@pytest.mark.parametrize(
    ("n", "v", "d"), [(0, 97, 65), (1, 1, 1), (1, 97, 65), (33, 97, 65), (5, 1003, 9), (2, 32001, 5), (1, 50257, 3)]
)
def test_divergences(n: int, v: int, d: int) -> None:
    assert_as_exact_as_torch(linear_jsd, linear_jsd_reference, jsd_inputs(n, v, d), upstream(n), WANTED)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_heads(transform: dict[str, float]) -> None:
    inputs, fixed = head_inputs(6, 1100, 17, bias=True), {"target": targets(6, 1100), **transform}
    wanted = [*WANTED, "bias"]
    assert_as_exact_as_torch(response_logprob, response_logprob_reference, inputs, upstream(6), wanted, **fixed)
    sides = jsd_inputs(6, 1100, 17, bias=True)
    assert_as_exact_as_torch(linear_jsd, linear_jsd_reference, sides, upstream(6), BOTH_SIDES, **transform)


def test_whole_loss() -> None:
    inputs, target = jsd_inputs(7, 1100, 9, bias=True), targets(11, 1100)
    complete = head_inputs(11, 1100, 9, seed=5)["hidden"]

    def loss(hidden: Tensor, masked_hidden: Tensor, **rest: Tensor) -> Tensor:
        scales = {"ce_scale": 0.7, "jsd_scale": 0.3}
        return linear_kpig_loss(hidden, target, masked_hidden, **rest, **scales).loss

    def reference(
        hidden: Tensor, masked_hidden: Tensor, weight: Tensor, bias: Tensor, ref_hidden: Tensor, ref_weight: Tensor,
        ref_bias: Tensor, temperature: Tensor,
    ) -> Tensor:  # fmt: skip
        log_probs = response_logprob_reference(hidden, weight, target, bias=bias)
        divergences = linear_jsd_reference(
            masked_hidden, weight, ref_hidden, ref_weight, temperature, bias=bias, ref_bias=ref_bias
        )
        return 0.3 * divergences.sum() - 0.7 * log_probs.sum()

    given = inputs | {"hidden": complete, "masked_hidden": inputs["hidden"]}
    wanted = ["hidden", "masked_hidden", "weight", "bias"]
    assert_as_exact_as_torch(loss, reference, given, torch.tensor(-2.5), wanted)


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits(size: float) -> None:
    inputs = jsd_inputs(9, 1100, 16)
    inputs |= {name: inputs[name] * size for name in ("hidden", "ref_hidden")}
    found = run(linear_jsd, inputs, upstream(9), WANTED)
    exact = run(linear_jsd_reference, widened(inputs), upstream(9), WANTED)
    assert all(torch.isfinite(x).all() for x in found.values())
    assert float((found["out"] - exact["out"]).abs().max()) < 1e-6 + 1e-6 * size
    assert float(found["out"].min()) >= 0
    assert float(found["out"].max()) <= 1 + 1e-6
    model = {name: inputs[name] for name in WANTED}
    found = run(response_logprob, model, upstream(9), WANTED, target=targets(9, 1100))
    exact = run(response_logprob_reference, widened(model), upstream(9), WANTED, target=targets(9, 1100))
    assert all(torch.isfinite(x).all() for x in found.values())
    assert relative(found["out"], exact["out"]) < 1e-5


def test_both_probabilities_underflow() -> None:
    weight = torch.tensor([[0.0], [-1e4], [-2e4]])
    inputs = {"hidden": torch.ones(1, 1), "weight": weight, "ref_hidden": torch.full((1, 1), 1.5), "ref_weight": weight}
    found = run(linear_jsd, inputs | {"temperature": torch.ones(1)}, torch.ones(1), WANTED)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())


def test_opposite_distributions_give_one_bit() -> None:
    weight = torch.tensor([[50.0], [-50.0], [0.0]])
    inputs = {"hidden": torch.ones(2, 1), "weight": weight, "ref_hidden": -torch.ones(2, 1), "ref_weight": weight}
    torch.testing.assert_close(linear_jsd(**inputs, temperature=torch.tensor([1.0, 2.0])), torch.ones(2))


def test_unlikely_and_certain_targets_keep_their_accuracy() -> None:
    # p = e^-400 underflows; 1 - p = 2 e^-20 is below the rounding of 1.
    z = torch.tensor([[0.0, -400.0, -20.0, -20.0]]).repeat(2, 1)
    out, rest = torch.empty(2), 2 * math.exp(-20)
    rows_triton.logprob(z, torch.tensor([1, 0]), (None, None, 1.0), out, (torch.ones(2), z))
    assert float(out[0]) == -400
    torch.testing.assert_close(out[1].double(), torch.tensor(-rest).double(), rtol=1e-6, atol=0)
    assert z[:, 1].tolist() == [1, 0]
    torch.testing.assert_close(z[1, 0].double(), torch.tensor(rest).double(), rtol=1e-6, atol=0)


# Row passes by themselves


@pytest.mark.parametrize("given", HEADS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [logprob, jsd])
def test_only_rows_are_written_and_nothing_else_is_read(rows, columns: int, given: tuple) -> None:
    memory = poison(torch.empty(6, columns + 9))
    z = memory[1:-1, :columns].copy_(normal(4, columns))
    exact = z.double()
    truth = rows(rows_torch, exact, head(given, columns, torch.float64), exact)
    assert torch.equal(rows(rows_triton, z, head(given, columns), None), rows(rows_triton, z, head(given, columns), z))
    torch.testing.assert_close(z.double(), exact, rtol=1e-5, atol=1e-6)
    z.copy_(normal(4, columns))
    torch.testing.assert_close(rows(rows_triton, z, head(given, columns), None).double(), truth, rtol=1e-5, atol=1e-6)
    poison(z)
    assert torch.equal(memory.view(torch.int32), poison(torch.empty_like(memory)).view(torch.int32))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [logprob, jsd])
def test_half_precision_gradient_over_its_own_row(rows, columns: int, dtype: torch.dtype) -> None:
    plain, transform = normal(4, columns), head(HEADS[1], columns)
    out = rows(rows_triton, plain, transform, plain)
    memory = poison(torch.empty(6, columns + 9 + columns % 2))
    z = memory[1:-1, :columns].copy_(normal(4, columns))
    dz = z.view(dtype)[:, :columns]
    assert torch.equal(rows(rows_triton, z, transform, dz), out)
    # Where a GPU rounds to bf16, the interpreter cuts bits off.
    cut = (plain.view(torch.int32) >> 16).to(torch.int16).view(dtype)
    assert torch.equal(dz, cut if dtype == torch.bfloat16 else plain.to(dtype))
    poison(z)
    assert torch.equal(memory.view(torch.int32), poison(torch.empty_like(memory)).view(torch.int32))


def test_ignored_rows_are_zero_whatever_their_logits() -> None:
    z = normal(5, 1100)
    z[0] = math.nan
    out = logprob(rows_triton, z, (None, None, 1.0), z)
    assert targets(5, 1100).tolist()[0] == -100
    assert float(out[0]) == 0
    assert torch.equal(z[0], torch.zeros(1100))
    assert torch.isfinite(z).all()


@pytest.mark.parametrize("sigma", [0.003, 0.03, 0.3])
def test_nearly_equal_rows_keep_their_relative_accuracy(sigma: float) -> None:
    z, t, grad = normal(4, 4099), torch.linspace(1, 2, 4), 1 + upstream(4).abs()
    r, transform = z + sigma / 3 * normal(4, 4099, seed=1), (None, None, 1.0)
    exact, truth, out = z.double(), torch.empty(4, dtype=torch.float64), torch.empty(4)
    rows_torch.jsd(exact, transform, r.double(), transform, t.double(), truth, (grad.double(), exact))
    rows_triton.jsd(z, transform, r, transform, t, out, (grad, z))
    assert 0 < float(truth.mean()) < 0.1 * sigma
    # Plain PyTorch in float32 is 4e-3 off in a divergence of 1e-6.
    assert relative(out, truth) < 1e-4
    assert relative(z, exact) < 1e-4


def test_a_divergence_that_rounding_hides_is_not_negative() -> None:
    z, t, out = normal(64, 30), torch.ones(64), torch.empty(64)
    r = z + 3e-8 * normal(64, 30, seed=1)
    rows_triton.jsd(z, (None, None, 1.0), r, (None, None, 1.0), t, out, None)
    assert float(out.min()) == 0 < float(out.max()) < 1e-13


def test_rows_with_a_large_offset_keep_the_accuracy_of_their_differences() -> None:
    # Eighths: the differences of entries are exact, what is known of a row is not.
    z, r = ((8 * normal(4, 1100, seed=seed)).round() / 8 + offset for seed, offset in ((0, 0.0), (1, 1024.0)))
    t, out, transform = torch.ones(4), torch.empty(4), (None, None, 1.0)
    exact, truth = z.double(), torch.empty(4, dtype=torch.float64)
    rows_torch.jsd(exact, transform, r.double(), transform, t.double(), truth, (t.double(), exact))
    rows_triton.jsd(z, transform, r, transform, t, out, (t, z))
    assert relative(out, truth) < 1e-6
    assert relative(z, exact) < 1e-6


def test_equal_rows_have_no_divergence_and_no_gradient() -> None:
    z, t, out = normal(4, 1100), torch.linspace(0.5, 2, 4), poison(torch.empty(4))
    transform, r = head(HEADS[1], 1100), z.clone()
    rows_triton.jsd(z, transform, r, transform, t, out, (torch.ones(4), z))
    assert torch.equal(out, torch.zeros(4))
    assert torch.equal(z, torch.zeros_like(z))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 1050])
def test_a_row_that_is_not_a_number_stays_visible(column: int, broken: float) -> None:
    expected = [False, True, False, False]
    for rows in (logprob, jsd):
        z = normal(4, 1100)
        z[1, column] = broken
        out = rows(rows_triton, z, (None, None, 1.0), z)
        assert out.isnan().tolist() == expected
        assert z.isnan().any(1).tolist() == expected
    r, out = normal(4, 1100), torch.empty(4)
    r[1, column] = broken
    rows_triton.jsd(normal(4, 1100, seed=1), (None, None, 1.0), r, (None, None, 1.0), torch.ones(4), out, None)
    assert out.isnan().tolist() == expected


@pytest.mark.parametrize("side", ["both", "model", "reference"])
def test_a_bias_may_rule_tokens_out(side: str) -> None:
    z, r, t, out, grad = normal(4, 1100), normal(4, 1100, seed=1), torch.ones(4), torch.empty(4), upstream(4)
    ruled_out, none = torch.zeros(1100), torch.zeros(1100)
    ruled_out[::3] = -math.inf
    biases = none if side == "reference" else ruled_out, none if side == "model" else ruled_out
    given = (biases[0], None, 1.0), (biases[1], None, 1.0)
    # The same probabilities without infinity.
    wide = [((bias.double().clamp(min=-1e4)), None, 1.0) for bias in biases]
    exact, truth = z.double(), torch.empty(4, dtype=torch.float64)
    rows_torch.jsd(exact, wide[0], r.double(), wide[1], t.double(), truth, (grad.double(), exact))
    rows_triton.jsd(z, given[0], r, given[1], t, out, (grad, z))
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(z.double(), exact, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("given", HEADS, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_score_tile(columns: int, given: tuple) -> None:
    target = torch.tensor([40, 39 + columns, 39, 40 + columns, -100])
    start = torch.full((5,), -math.inf), torch.zeros(5), torch.full((5,), 0.5)
    memory = poison(torch.empty(5, columns + 9))
    z = memory[:, :columns].copy_(normal(5, columns))
    found, truth = [x.clone() for x in start], [x.double() for x in start]
    # A tile that is ruled out as a whole comes first, then one that adds to another.
    nothing = torch.full((columns,), -math.inf), None, 1.0
    rows_triton.score_tile(z, 10**6, target, nothing, *found)
    assert torch.equal(found[1], torch.zeros(5))
    transform = head(given, columns)
    for seed in (0, 1):
        z.copy_(normal(5, columns, seed=seed))
        rows_torch.score_tile(z.double(), 40, target, head(given, columns, torch.float64), *truth)
        with touches_only(z, target, transform[0], *found):
            rows_triton.score_tile(z, 40, target, transform, *found)
    for x, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-6, atol=1e-6)
    assert found[2].tolist()[2:] == [0.5, 0.5, 0.5]
    assert not memory[:, columns:].isfinite().any()


@pytest.mark.parametrize("rows", [logprob, jsd])
def test_repeated_runs_give_the_same_bits(rows) -> None:
    first, again = normal(4, 2500), normal(4, 2500)
    transform = head(HEADS[1], 2500)
    assert torch.equal(rows(rows_triton, first, transform, first), rows(rows_triton, again, transform, again))
    assert torch.equal(first, again)
