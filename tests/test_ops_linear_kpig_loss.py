"""The whole loss in one operator against the two sums that it is made of."""

import pytest
import torch
from ops_cases import TRANSFORMS, head_inputs, jsd_inputs, ops_module, relative, targets, widened
from torch import Tensor

from kpig_fast.ops import KPIGLoss, linear_kpig_loss
from kpig_fast.ops.reference import linear_jsd_reference, response_logprob_reference

SCALES = {"ce_scale": 1 / 57, "jsd_scale": 0.02 / 57}
WANTED = ["hidden", "masked_hidden", "weight", "bias"]

pytestmark = pytest.mark.usefixtures("path")


def loss_inputs(n: int, m: int, v: int = 97, d: int = 65) -> dict[str, Tensor]:
    """Arguments of ``linear_kpig_loss`` for n complete and m masked rows, every fifth complete row left out."""
    inputs = jsd_inputs(m, v, d, bias=True)
    inputs["masked_hidden"] = inputs["hidden"]
    return inputs | {"hidden": head_inputs(n, v, d, seed=5)["hidden"], "target": targets(n, v)}


def reference(
    hidden: Tensor, target: Tensor, masked_hidden: Tensor, ref_hidden: Tensor, temperature: Tensor, weight: Tensor,
    ref_weight: Tensor, *, ce_scale: float, jsd_scale: float, bias: Tensor | None = None,
    ref_bias: Tensor | None = None, **transform: float,
) -> KPIGLoss:  # fmt: skip
    log_probs = response_logprob_reference(hidden, weight, target, bias=bias, **transform)
    jsd = linear_jsd_reference(
        masked_hidden, weight, ref_hidden, ref_weight, temperature, bias=bias, ref_bias=ref_bias, **transform
    )
    return KPIGLoss(jsd_scale * jsd.sum() - ce_scale * log_probs.sum(), log_probs, jsd)


def run(function, inputs: dict[str, Tensor], wanted: list[str], grad: float = 1.0, **options) -> dict[str, Tensor]:
    """Loss, its parts, and the gradients by ``wanted`` for the upstream gradient ``grad``."""
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    out = function(**leaves, **(SCALES | options))
    out.loss.backward(torch.full_like(out.loss, grad))
    return {name: x.detach() for name, x in out._asdict().items()} | {name: leaves[name].grad for name in wanted}


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return widened({name: x for name, x in inputs.items() if name != "target"}) | {"target": inputs["target"]}


def assert_exact(inputs: dict[str, Tensor], wanted: list[str] = WANTED, **options) -> None:
    """float64 equals the reference; float32 errs at most three times as far as the reference in float32."""
    exact = run(reference, in_double(inputs), wanted, **options)
    double = run(linear_kpig_loss, in_double(inputs), wanted, **options)
    own, found = (run(function, inputs, wanted, **options) for function in (reference, linear_kpig_loss))
    for name, truth in exact.items():
        torch.testing.assert_close(double[name], truth, rtol=1e-12, atol=1e-12)
        assert found[name].dtype == torch.float32
        if truth.numel():
            allowed = 3 * float((own[name] - truth).abs().max()) + 2 * 2**-23 * float(truth.abs().max())
            assert float((found[name] - truth).abs().max()) <= allowed, name


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 10 (divergence: 5) rows, swept 2 at a time, with ragged ends, for a vocabulary of 97."""
    monkeypatch.setattr(ops_module("head"), "CHUNK_ELEMENTS", 5 * 2 * 97)
    monkeypatch.setattr(ops_module("rows_torch"), "SWEEP_ELEMENTS", 2 * 97)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 7), (7, 0), (1, 1), (63, 41), (257, 256)])
def test_rows(n: int, m: int) -> None:
    assert_exact(loss_inputs(n, m), grad=-2.5)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_heads(transform: dict[str, float]) -> None:
    assert_exact(loss_inputs(63, 41), **transform)


def test_real_vocabulary() -> None:
    assert_exact(loss_inputs(9, 8, v=32001))


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_blocks_of_any_size(transform: dict[str, float]) -> None:
    inputs = in_double(loss_inputs(63, 41))
    exact = run(reference, inputs, WANTED, **transform)
    found = run(linear_kpig_loss, inputs, WANTED, **transform)
    for name, truth in exact.items():
        torch.testing.assert_close(found[name], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [["hidden"], ["masked_hidden"], ["weight"], ["bias"], ["hidden", "masked_hidden"]])
def test_only_what_is_wanted_gets_a_gradient(wanted: list[str]) -> None:
    assert_exact(loss_inputs(9, 8), wanted)


def test_without_biases() -> None:
    inputs = {name: x for name, x in loss_inputs(9, 8).items() if "bias" not in name}
    assert_exact(inputs, WANTED[:-1])


def test_parts_are_those_of_the_two_operators_and_carry_no_graph() -> None:
    inputs = loss_inputs(9, 8)
    out = linear_kpig_loss(**{name: x.requires_grad_(name in WANTED) for name, x in inputs.items()}, **SCALES)
    assert out.loss.requires_grad
    assert not out.log_probs.requires_grad
    assert not out.jsd.requires_grad
    expected = SCALES["jsd_scale"] * out.jsd.sum() - SCALES["ce_scale"] * out.log_probs.sum()
    torch.testing.assert_close(out.loss.detach(), expected)


def test_no_gradient_wanted() -> None:
    inputs = loss_inputs(9, 8)
    plain = linear_kpig_loss(**inputs, **SCALES)
    with torch.no_grad():
        quiet = linear_kpig_loss(**{name: x.requires_grad_(name in WANTED) for name, x in inputs.items()}, **SCALES)
    assert not plain.loss.requires_grad
    assert not quiet.loss.requires_grad
    assert torch.equal(plain.loss, quiet.loss)


def test_ignored_rows_give_zero_gradient() -> None:
    inputs = loss_inputs(9, 8) | {"target": torch.full((9,), -100)}
    found = run(linear_kpig_loss, inputs, WANTED, jsd_scale=0.0)
    assert torch.equal(found["log_probs"], torch.zeros(9))
    assert all(torch.equal(found[name], torch.zeros_like(found[name])) for name in ["loss", *WANTED])


def test_backward_runs_twice_over_one_graph() -> None:
    inputs = loss_inputs(9, 8)
    leaves = [inputs[name].requires_grad_() for name in WANTED]
    out = linear_kpig_loss(**inputs, **SCALES)
    first = torch.autograd.grad(out.loss, leaves, torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(out.loss, leaves, torch.tensor(1.0))
    for a, b in zip(first, second):
        torch.testing.assert_close(a, 3 * b)


def test_bf16_inputs_give_float32_logits_of_the_widened_inputs() -> None:
    inputs = loss_inputs(63, 41, v=1003, d=64)
    target, temperature = inputs.pop("target"), inputs.pop("temperature")
    fixed = {"target": target, "temperature": temperature}
    inputs = widened(inputs, torch.bfloat16)
    found = run(linear_kpig_loss, inputs | fixed, WANTED)
    wide = run(linear_kpig_loss, widened(inputs, torch.float32) | fixed, WANTED)
    assert all(torch.equal(found[name], wide[name]) for name in ("loss", "log_probs", "jsd"))
    assert all(torch.equal(found[name], wide[name].bfloat16()) for name in WANTED)


@pytest.mark.parametrize("side", ["hidden", "masked_hidden", "ref_hidden"])
def test_a_row_that_is_not_a_number_shows_in_the_loss(side: str) -> None:
    inputs = loss_inputs(9, 8)
    inputs[side][4, 3] = float("nan")
    out = linear_kpig_loss(**inputs, **SCALES)
    part = out.log_probs if side == "hidden" else out.jsd
    assert part.isnan().nonzero()[:, 0].tolist() == [4]
    assert out.loss.isnan()


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits(size: float) -> None:
    inputs = loss_inputs(200, 33, v=1003, d=16)
    for name in ("hidden", "masked_hidden", "ref_hidden"):
        inputs[name] *= size
    found = run(linear_kpig_loss, inputs, WANTED)
    assert all(torch.isfinite(x).all() for x in found.values())
    assert float(found["log_probs"].max()) <= 0
    assert 0 <= float(found["jsd"].min()) <= float(found["jsd"].max()) <= 1 + 1e-6


def test_gradient_between_nearly_equal_models() -> None:
    inputs = loss_inputs(40, 40, v=4099, d=64)
    noise = torch.randn(4099, 64, generator=torch.Generator().manual_seed(9)) * 0.003 / 8
    inputs |= {"ref_hidden": inputs["masked_hidden"], "ref_weight": inputs["weight"] + noise}
    inputs["ref_bias"] = inputs["bias"]
    found = run(linear_kpig_loss, inputs, WANTED, ce_scale=0.0, jsd_scale=1.0)
    exact = run(reference, in_double(inputs), WANTED, ce_scale=0.0, jsd_scale=1.0)
    for name in WANTED[1:]:
        assert relative(found[name], exact[name]) < 1e-3


def test_gradcheck() -> None:
    inputs = in_double(loss_inputs(4, 3, v=11, d=3))
    leaves = [inputs[name].requires_grad_() for name in WANTED]

    def loss(hidden: Tensor, masked_hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = {"hidden": hidden, "masked_hidden": masked_hidden, "weight": weight, "bias": bias}
        return linear_kpig_loss(**(inputs | changed), ce_scale=0.3, jsd_scale=0.9, softcap=3.0, logit_scale=0.7).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target \[3\], one a row; got \[2\]"),
        ({"target": torch.tensor([0, 97, 1])}, "target 97 is no token id"),
        ({"masked_hidden": torch.zeros(2, 64)}, r", masked rows, needs hidden \[N, D\]"),
        ({"temperature": torch.ones(3)}, r", masked rows, needs temperature \[2\], one a row; got \[3\]"),
        ({"ref_hidden": torch.zeros(2, 65)}, r", reference side, needs hidden"),
        ({"ref_weight": torch.zeros(98, 66), "ref_bias": torch.zeros(98)}, "one vocabulary; got 97 and 98 entries"),
        ({"bias": torch.zeros(98)}, r"bias \[97\], one a vocabulary entry; got \[98\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kpig_loss(**(loss_inputs(3, 2) | change), **SCALES)
