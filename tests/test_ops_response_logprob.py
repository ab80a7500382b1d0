"""Log-probabilities of target tokens: values, gradients, and the places where such kernels have gone wrong."""

import math

import pytest
import torch
from ops_cases import (
    SHAPES,
    SMALLEST,
    TRANSFORMS,
    assert_as_exact_as_torch,
    assert_exact_in_float64,
    head_inputs,
    ops_module,
    relative,
    run,
    targets,
    upstream,
    widened,
)

from kpig_fast.ops import response_logprob
from kpig_fast.ops.reference import response_logprob_reference

WANTED = ["hidden", "weight"]

pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 5 rows × 7 columns and chunks of 4 rows, with ragged ends, for a vocabulary of 97."""
    monkeypatch.setattr(ops_module("response_logprob"), "CPU_TILE", (5, 7))
    monkeypatch.setattr(ops_module("head"), "CHUNK_ELEMENTS", 4 * 97)


@pytest.mark.parametrize(("n", "v", "d"), SHAPES)
def test_non_uniform_upstream_gradient(n: int, v: int, d: int) -> None:
    inputs = head_inputs(n, v, d)
    assert_as_exact_as_torch(
        response_logprob, response_logprob_reference, inputs, upstream(n), WANTED, target=targets(n, v)
    )


@pytest.mark.parametrize(("n", "v", "d"), SMALLEST)
def test_smallest_inputs(n: int, v: int, d: int) -> None:
    fixed = {"target": targets(n, v, ignored=False)}
    wanted, inputs = [*WANTED, "bias"], head_inputs(n, v, d, bias=True)
    assert_exact_in_float64(response_logprob, response_logprob_reference, inputs, upstream(n), wanted, **fixed)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_heads(bias: bool, transform: dict[str, float]) -> None:
    inputs, wanted = head_inputs(63, 97, 65, bias=bias), [*WANTED, "bias"] if bias else WANTED
    fixed = {"target": targets(63, 97), **transform}
    assert_as_exact_as_torch(response_logprob, response_logprob_reference, inputs, upstream(63), wanted, **fixed)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_blocks_of_any_size(transform: dict[str, float]) -> None:
    inputs, wanted = head_inputs(63, 97, 65, bias=True), [*WANTED, "bias"]
    fixed = {"target": targets(63, 97), **transform}
    assert_exact_in_float64(response_logprob, response_logprob_reference, inputs, upstream(63), wanted, **fixed)


@pytest.mark.parametrize("wanted", [["hidden"], ["weight"], ["bias"], ["weight", "bias"]], ids=str)
def test_only_what_is_wanted_gets_a_gradient(wanted: list[str]) -> None:
    assert_as_exact_as_torch(
        response_logprob,
        response_logprob_reference,
        head_inputs(9, 97, 8, bias=True),
        upstream(9),
        wanted,
        target=targets(9, 97),
    )


def test_ignored_rows_give_exactly_zero_and_keep_the_graph() -> None:
    inputs = head_inputs(6, 97, 8)
    ignored = torch.full((6,), -100)
    found = run(response_logprob, inputs, upstream(6), WANTED, target=ignored)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())

    some = torch.tensor([-100, 4, -100, 96, 0, -100])
    mixed = run(response_logprob, inputs, upstream(6), WANTED, target=some)
    kept = some != -100
    part = run(
        response_logprob,
        inputs | {"hidden": inputs["hidden"][kept]},
        upstream(6)[kept],
        WANTED,
        target=some[kept],
    )
    assert torch.equal(mixed["out"][~kept], torch.zeros(3))
    assert torch.equal(mixed["hidden"][~kept], torch.zeros(3, 8))
    torch.testing.assert_close(mixed["out"][kept], part["out"])
    torch.testing.assert_close(mixed["hidden"][kept], part["hidden"])
    torch.testing.assert_close(mixed["weight"], part["weight"])


def test_backward_runs_twice_over_one_graph() -> None:
    inputs = {name: x.requires_grad_() for name, x in head_inputs(9, 97, 8).items()}
    out = response_logprob(**inputs, target=targets(9, 97))
    first = torch.autograd.grad(out, list(inputs.values()), upstream(9), retain_graph=True)
    second = torch.autograd.grad(out, list(inputs.values()), upstream(9))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_never_above_zero() -> None:
    # One token takes all the probability: log-sum-exp rounds to either side of its logit.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(2000, 4, generator=generator) * 30 + 1
    weight = torch.zeros(50, 4)
    weight[7] = 1
    out = response_logprob(hidden, weight, torch.full((2000,), 7))
    assert float(out.max()) <= 0
    assert float(out.min()) < 0


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits(size: float) -> None:
    inputs = head_inputs(33, 1003, 16)
    inputs["hidden"] *= size
    found = run(response_logprob, inputs, upstream(33), WANTED, target=targets(33, 1003))
    exact = run(response_logprob_reference, widened(inputs), upstream(33), WANTED, target=targets(33, 1003))
    # Logits of this size are themselves rounded by 2^-24 of it, which a softmax turns into a factor.
    tolerance = 1e-6 + size * 2e-6
    for name, truth in exact.items():
        assert torch.isfinite(found[name]).all()
        assert relative(found[name], truth) < (1e-5 if name == "out" else tolerance)


def test_a_row_that_is_not_a_number_stays_visible() -> None:
    inputs, target = head_inputs(4, 97, 8), targets(4, 97, ignored=False)
    inputs["hidden"][2, 3] = math.nan
    found = run(response_logprob, inputs, upstream(4), ["hidden"], target=target)
    assert found["out"].isnan().tolist() == [False, False, True, False]
    assert found["hidden"].isnan().any(1).tolist() == [False, False, True, False]


def test_unlikely_targets_keep_their_log_probability_and_gradient() -> None:
    # p = e^-400 underflows; its logarithm and the gradient of 1 - p do not.
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [-400.0], [0.0]])
    out = response_logprob(hidden, weight, torch.tensor([1]))
    out.backward()
    assert float(out.detach()) == pytest.approx(-400 - math.log(2), rel=1e-7)
    assert hidden.grad is not None
    assert float(hidden.grad) == pytest.approx(-400, rel=1e-7)


def test_bf16_inputs_give_float32_logits_of_the_widened_inputs() -> None:
    inputs = widened(head_inputs(63, 1003, 64), torch.bfloat16)
    target = targets(63, 1003)
    found = run(response_logprob, inputs, upstream(63), WANTED, target=target)
    wide = run(response_logprob, widened(inputs, torch.float32), upstream(63), WANTED, target=target)
    assert found["out"].dtype == torch.float32
    assert torch.equal(found["out"], wide["out"])
    for name in WANTED:
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], wide[name].bfloat16())


def test_strided_and_offset_inputs() -> None:
    inputs, target = head_inputs(20, 97, 9, bias=True), targets(20, 97)
    plain = run(response_logprob, inputs, upstream(20), [*WANTED, "bias"], target=target)

    def strided(x: torch.Tensor) -> torch.Tensor:
        padded = x.new_full((2 * len(x) + 1, *(2 * size + 3 for size in x.shape[1:])), math.nan)
        view = padded[1::2, 3::2] if x.dim() == 2 else padded[1::2]
        return view.copy_(x)

    views = {name: strided(x) for name, x in inputs.items()}
    assert not any(view.is_contiguous() for view in views.values())
    spaced = run(response_logprob, views, upstream(20), [*WANTED, "bias"], target=target.repeat_interleave(2)[::2])
    for name, x in plain.items():
        torch.testing.assert_close(spaced[name], x)
    # An expanded gradient has stride 0.
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    response_logprob(**leaves, target=target).sum().backward()
    ones = run(response_logprob, inputs, torch.ones(20), ["hidden"], target=target)
    assert leaves["hidden"].grad is not None
    assert torch.equal(leaves["hidden"].grad, ones["hidden"])


@pytest.mark.usefixtures("tiny_blocks")
def test_gradcheck() -> None:
    inputs = [x.double().requires_grad_() for x in head_inputs(5, 11, 3, bias=True).values()]
    target = targets(5, 11)

    def op(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return response_logprob(hidden, weight, target, bias=bias, softcap=3.0, logit_scale=0.7)

    def reference(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return response_logprob_reference(hidden, weight, target, bias=bias, softcap=3.0, logit_scale=0.7)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(reference, inputs)


@pytest.mark.parametrize("wrong", [97, -1, -101, 2**40])
def test_targets_outside_the_vocabulary_are_named(wrong: int) -> None:
    inputs = head_inputs(3, 97, 4)
    with pytest.raises(ValueError, match=f"target {wrong} is no token id; give 0 ... 96, or -100"):
        response_logprob(**inputs, target=torch.tensor([0, wrong, -100]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"hidden \[N, D\] and weight \[V, D\]; got \[3, 5\] and \[97, 4\]"),
        ({"hidden": torch.zeros(1, 3, 4)}, r"got \[1, 3, 4\]"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target \[3\], one a row; got \[2\]"),
        ({"bias": torch.zeros(96)}, r"bias \[97\], one a vocabulary entry; got \[96\]"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    inputs = head_inputs(3, 97, 4) | {"target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        response_logprob(**(inputs | change))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_targets_of_any_integer_type(dtype: torch.dtype) -> None:
    inputs, target = head_inputs(20, 97, 9), targets(20, 97)
    expected = run(response_logprob, inputs, upstream(20), WANTED, target=target)
    found = run(response_logprob, inputs, upstream(20), WANTED, target=target.to(dtype))
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
