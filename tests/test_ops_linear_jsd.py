"""The divergence from a reference model: values, gradients to both sides, and distributions that break others."""

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
    jsd_inputs,
    ops_module,
    relative,
    run,
    upstream,
    widened,
)
from torch import Tensor

from kpig_fast.ops import linear_jsd
from kpig_fast.ops.reference import linear_jsd_reference

WANTED = ["hidden", "weight"]
BOTH_SIDES = [*WANTED, "bias", "ref_hidden", "ref_weight", "ref_bias"]

pytestmark = pytest.mark.usefixtures("path")


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 rows, swept 2 rows at a time, with ragged ends, for a vocabulary of 97."""
    monkeypatch.setattr(ops_module("head"), "CHUNK_ELEMENTS", 5 * 2 * 97)
    monkeypatch.setattr(ops_module("rows_torch"), "SWEEP_ELEMENTS", 2 * 97)


def close_models(sigma: float, *, n: int = 40, v: int = 4099, d: int = 64) -> dict[str, Tensor]:
    """Two heads over one hidden state, whose logits differ by noise of standard deviation ``sigma``."""
    model = head_inputs(n, v, d)
    noise = torch.randn(v, d, generator=torch.Generator().manual_seed(9)) * sigma / d**0.5
    return model | {
        "ref_hidden": model["hidden"],
        "ref_weight": model["weight"] + noise,
        "temperature": torch.linspace(1, 2, n),
    }


@pytest.mark.parametrize(("n", "v", "d"), SHAPES)
def test_non_uniform_upstream_gradient(n: int, v: int, d: int) -> None:
    assert_as_exact_as_torch(linear_jsd, linear_jsd_reference, jsd_inputs(n, v, d), upstream(n), WANTED)


@pytest.mark.parametrize(("n", "v", "d"), SMALLEST)
def test_smallest_inputs(n: int, v: int, d: int) -> None:
    assert_exact_in_float64(linear_jsd, linear_jsd_reference, jsd_inputs(n, v, d, bias=True), upstream(n), BOTH_SIDES)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_heads(bias: bool, transform: dict[str, float]) -> None:
    inputs = jsd_inputs(63, 97, 65, bias=bias)
    wanted = BOTH_SIDES if bias else [*WANTED, "ref_hidden", "ref_weight"]
    assert_as_exact_as_torch(linear_jsd, linear_jsd_reference, inputs, upstream(63), wanted, **transform)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_blocks_of_any_size(transform: dict[str, float]) -> None:
    inputs = jsd_inputs(63, 97, 65, bias=True)
    assert_exact_in_float64(linear_jsd, linear_jsd_reference, inputs, upstream(63), BOTH_SIDES, **transform)


@pytest.mark.parametrize("wanted", [["hidden"], ["weight"], ["bias"], ["ref_hidden"], ["ref_weight", "ref_bias"]])
def test_only_what_is_wanted_gets_a_gradient(wanted: list[str]) -> None:
    inputs = jsd_inputs(9, 97, 8, bias=True)
    assert_as_exact_as_torch(linear_jsd, linear_jsd_reference, inputs, upstream(9), wanted)


def test_bias_on_one_side_only() -> None:
    inputs = jsd_inputs(9, 97, 8, bias=True)
    del inputs["ref_bias"]
    assert_exact_in_float64(linear_jsd, linear_jsd_reference, inputs, upstream(9), [*WANTED, "bias", "ref_weight"])


@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.03, 0.1, 0.3])
def test_gradient_between_nearly_equal_distributions(sigma: float) -> None:
    inputs, grad = close_models(sigma), 1 + upstream(40).abs()
    found = run(linear_jsd, inputs, grad, WANTED)
    exact = run(linear_jsd_reference, widened(inputs), grad, WANTED)
    assert 0 < float(exact["out"].mean()) < 0.1 * sigma
    assert relative(found["hidden"], exact["hidden"]) < 1e-3
    assert relative(found["weight"], exact["weight"]) < 1e-3


def test_gradient_between_nearly_equal_bf16_models() -> None:
    inputs, grad = widened(close_models(0.03), torch.bfloat16), 1 + upstream(40).abs()
    inputs["temperature"] = inputs["temperature"].float()
    found = run(linear_jsd, inputs, grad, WANTED)
    exact = run(linear_jsd_reference, widened(inputs), grad, WANTED)
    for name in WANTED:
        assert found[name].dtype == torch.bfloat16
        # Stored in 8 bits of mantissa at the end, computed in float32 until then.
        assert relative(found[name], exact[name]) < 2.5e-3
    assert found["out"].dtype == torch.float32
    assert relative(found["out"], exact["out"]) < 1e-3


def test_equal_distributions_give_zero() -> None:
    inputs = jsd_inputs(9, 97, 8)
    inputs |= {"ref_hidden": inputs["hidden"], "ref_weight": inputs["weight"]}
    found = run(linear_jsd, inputs, upstream(9), WANTED)
    assert float(found["out"].abs().max()) < 1e-7
    assert float(found["hidden"].abs().max()) < 1e-6


def test_opposite_distributions_give_one_bit() -> None:
    weight = torch.tensor([[50.0], [-50.0], [0.0]])
    inputs = {"hidden": torch.ones(2, 1), "weight": weight, "ref_hidden": -torch.ones(2, 1), "ref_weight": weight}
    out = linear_jsd(**inputs, temperature=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(out, torch.ones(2))


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits(size: float) -> None:
    inputs = jsd_inputs(33, 1003, 16)
    inputs["hidden"] *= size
    inputs["ref_hidden"] *= size
    found = run(linear_jsd, inputs, upstream(33), WANTED)
    exact = run(linear_jsd_reference, widened(inputs), upstream(33), WANTED)
    assert all(torch.isfinite(x).all() for x in found.values())
    assert float((found["out"] - exact["out"]).abs().max()) < 1e-6 + 1e-6 * size
    assert float(found["out"].min()) >= 0
    assert float(found["out"].max()) <= 1 + 1e-6


def test_both_probabilities_underflow() -> None:
    # The textbook formula divides 0 by 0 at the second and third entry.
    weight = torch.tensor([[0.0], [-1e4], [-2e4]])
    inputs = {"hidden": torch.ones(1, 1), "weight": weight, "ref_hidden": torch.full((1, 1), 1.5), "ref_weight": weight}
    found = run(linear_jsd, inputs | {"temperature": torch.ones(1)}, torch.ones(1), BOTH_SIDES[:2] + BOTH_SIDES[3:5])
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())


@pytest.mark.parametrize("side", ["hidden", "ref_hidden"])
def test_a_row_that_is_not_a_number_stays_visible(side: str) -> None:
    inputs = jsd_inputs(4, 97, 8)
    inputs[side][2, 3] = math.nan
    out = linear_jsd(**inputs)
    assert out.isnan().tolist() == [False, False, True, False]


def test_symmetric() -> None:
    inputs = jsd_inputs(20, 97, 9)
    swapped = {"hidden": "ref_hidden", "ref_hidden": "hidden", "weight": "ref_weight", "ref_weight": "weight"}
    exchanged = {swapped.get(name, name): x for name, x in inputs.items()}
    here = run(linear_jsd, inputs, upstream(20), WANTED)
    there = run(linear_jsd, exchanged, upstream(20), ["ref_hidden"])
    torch.testing.assert_close(here["out"], there["out"])
    torch.testing.assert_close(here["hidden"], there["ref_hidden"])


def test_every_row_has_its_own_temperature() -> None:
    inputs = jsd_inputs(8, 97, 9)
    together = linear_jsd(**inputs)
    for row in range(8):
        alone = {name: x[row : row + 1] if len(x) == 8 else x for name, x in inputs.items()}
        torch.testing.assert_close(linear_jsd(**alone)[0], together[row])
    assert len(together.unique()) == 8


def test_backward_runs_twice_over_one_graph() -> None:
    inputs = jsd_inputs(9, 97, 8)
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    out = linear_jsd(**inputs)
    first = torch.autograd.grad(out, leaves, upstream(9), retain_graph=True)
    second = torch.autograd.grad(out, leaves, upstream(9))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_bf16_inputs_give_float32_logits_of_the_widened_inputs() -> None:
    inputs = widened(jsd_inputs(63, 1003, 64), torch.bfloat16)
    found = run(linear_jsd, inputs, upstream(63), WANTED)
    wide = run(linear_jsd, widened(inputs, torch.float32), upstream(63), WANTED)
    assert torch.equal(found["out"], wide["out"])
    assert all(torch.equal(found[name], wide[name].bfloat16()) for name in WANTED)


def test_strided_and_offset_inputs() -> None:
    inputs = jsd_inputs(20, 97, 9, bias=True)
    plain = run(linear_jsd, inputs, upstream(20), BOTH_SIDES)
    padded = {
        name: torch.full([2 * size + 3 for size in x.shape], math.nan)[tuple(slice(3, None, 2) for _ in x.shape)]
        for name, x in inputs.items()
    }
    views = {name: padded[name].copy_(x) for name, x in inputs.items()}
    spaced = run(linear_jsd, views, upstream(20), BOTH_SIDES)
    assert not any(view.is_contiguous() for view in views.values())
    for name, x in plain.items():
        torch.testing.assert_close(spaced[name], x)


@pytest.mark.usefixtures("tiny_blocks")
def test_gradcheck() -> None:
    inputs = widened(jsd_inputs(5, 11, 3, bias=True))
    leaves = [inputs[name].requires_grad_() for name in BOTH_SIDES]

    def with_head(function):
        def call(hidden, weight, bias, ref_hidden, ref_weight, ref_bias):
            return function(
                hidden, weight, ref_hidden, ref_weight, inputs["temperature"],
                bias=bias, ref_bias=ref_bias, softcap=3.0, logit_scale=0.7,
            )  # fmt: skip

        return call

    assert torch.autograd.gradcheck(with_head(linear_jsd), leaves)
    assert torch.autograd.gradgradcheck(with_head(linear_jsd_reference), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, r"linear_jsd needs hidden \[N, D\] and weight \[V, D\]; got \[3, 5\]"),
        ({"ref_hidden": torch.zeros(3, 4)}, r", reference side, needs hidden \[N, D\]"),
        ({"ref_hidden": torch.zeros(2, 5)}, r", reference side, needs temperature \[2\], one a row; got \[3\]"),
        ({"temperature": torch.ones(4)}, r"temperature \[3\], one a row; got \[4\]"),
        ({"ref_weight": torch.zeros(98, 5)}, "one vocabulary; got 97 and 98 entries"),
        ({"ref_bias": torch.zeros(98)}, r"bias \[97\], one a vocabulary entry; got \[98\]"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_jsd(**(jsd_inputs(3, 97, 4) | change))
