"""Temperature, divergence and loss against exact arithmetic, high precision and the published gradient."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kpig_fast.method.objective import jsd_bits, kpig_loss, temperature

LN2 = math.log(2)

logits = st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=8)
pairs = st.integers(2, 8).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(-1e4, 1e4), min_size=size, max_size=size)] * 2)
)


def exact_jsd(z_p: list[float], z_q: list[float], beta: float = 1.0) -> mpmath.mpf:
    """Base-2 divergence with 50 digits, straight from its definition."""
    with mpmath.workdps(50):
        # An exponential of -2e4 still has its 50 digits here: nothing underflows.
        weights = [[mpmath.exp(mpmath.mpf(v) / mpmath.mpf(beta)) for v in z] for z in (z_p, z_q)]
        p, q = ([w / mpmath.fsum(side) for w in side] for side in weights)
        terms = [x * mpmath.log(2 * x / (x + y), 2) for x, y in [*zip(p, q), *zip(q, p)]]
        return mpmath.fsum(terms) / 2


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("gain", "beta"), [(0.0, 2.0), (0.25, 1.75), (1.0, 1.0), (1.5, 1.0), (-0.5, 2.5)])
def test_temperature_by_hand(gain, beta):
    assert temperature(gain) == beta
    assert temperature(double([gain])).tolist() == [beta]


def test_temperature_keeps_the_kind_that_it_is_given():
    assert isinstance(temperature(0.5), float)
    assert temperature(torch.tensor([0.5])).dtype == torch.float32


def test_jsd_of_two_tokens_worked_out_by_hand():
    # p = (3/4, 1/4), q = (1/4, 3/4), m = (1/2, 1/2): JSD = 3/4 log2(3/2) + 1/4 log2(1/2).
    by_hand = 0.75 * math.log2(1.5) - 0.25
    p = double([0.75, 0.25]).log()
    assert jsd_bits(p, p.flip(0), 1.0).item() == pytest.approx(by_hand, rel=1e-15)


def test_temperature_divides_both_sides_row_by_row():
    z_p, z_q = double([[0.0, 1.0, 3.0]] * 2), double([[2.0, 0.5, 0.0]] * 2)
    beta = double([1.25, 2.5])
    got = jsd_bits(z_p, z_q, beta)
    assert got.tolist() == [jsd_bits(z_p[i] / beta[i], z_q[i] / beta[i], 1.0).item() for i in (0, 1)]
    assert got[1] == jsd_bits(z_p, z_q, 2.5)[1]
    assert got[0] > got[1]


def test_half_precision_is_raised_before_anything_is_computed():
    z_p, z_q = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    beta = torch.full((4,), 1.3, dtype=torch.float64)
    got = jsd_bits(z_p, z_q, beta)
    assert got.dtype == torch.float32
    assert torch.equal(got, jsd_bits(z_p.float(), z_q.float(), beta))


@settings(deadline=None)
@given(pairs, st.floats(1, 3.5))
def test_jsd_of_any_logits_agrees_with_fifty_digits(pair, beta):
    got = jsd_bits(double(pair[0]), double(pair[1]), beta).item()
    # The scaled logits reach 1e4 and are rounded, which moves every log-probability by up to 1e4 * 2^-52.
    scale = max(1.0, *(abs(v) for side in pair for v in side))
    assert abs(got - float(exact_jsd(*pair, beta))) <= 16 * scale * 2.0**-52
    assert -1e-15 <= got <= 1 + 1e-15


@settings(deadline=None)
@given(pairs)
def test_jsd_is_symmetric_to_the_last_bit(pair):
    p, q = double(pair[0]), double(pair[1])
    assert torch.equal(jsd_bits(p, q, 1.5), jsd_bits(q, p, 1.5))


@settings(deadline=None)
@given(logits, st.floats(1, 3.5), st.sampled_from([torch.float32, torch.float64]))
def test_jsd_of_equal_logits_is_exactly_zero(values, beta, dtype):
    z = torch.tensor(values, dtype=dtype)
    assert jsd_bits(z, z.clone(), beta).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_underflowing_probabilities_give_neither_nan_nor_noise(dtype):
    z_p = torch.tensor([[1e4, -1e4, -1e4], [1e4, 0.0, -1e4], [0.0, 0.0, -1e4]], dtype=dtype, requires_grad=True)
    z_q = torch.tensor([[-1e4, 1e4, -1e4], [1e4, -1e4, 0.0], [0.0, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    got = jsd_bits(z_p, z_q, 1.0)
    # Disjoint: 1 bit. Same certain token: 0. Halves that share one token: m = (1/2, 1/4, 1/4), so 1/2.
    assert got.tolist() == pytest.approx([1.0, 0.0, 0.5], abs=4 * torch.finfo(dtype).eps)
    got.sum().backward()
    for leaf in (z_p, z_q):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


def test_excluded_tokens_change_nothing():
    z_p, z_q = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    closed = torch.full((3, 2), -math.inf, dtype=torch.float64)
    padded = torch.cat([z_p, closed], 1).requires_grad_()
    got = jsd_bits(padded, torch.cat([z_q, closed], 1), 1.5)
    assert torch.allclose(got, jsd_bits(z_p, z_q, 1.5), rtol=1e-15, atol=0)
    got.sum().backward()
    assert padded.grad is not None
    assert torch.equal(padded.grad[:, 6:], torch.zeros(3, 2, dtype=torch.float64))
    assert torch.isfinite(padded.grad).all()


def test_a_token_excluded_on_one_side_only_has_its_full_share():
    got = jsd_bits(double([0.0, -math.inf]), double([-math.inf, 0.0]), 1.0)
    assert got.item() == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_equal_distributions(distance):
    generator = torch.Generator().manual_seed(2)
    z_p = 3 * torch.randn(64, generator=generator, dtype=torch.float64)
    z_q = z_p + distance * torch.randn(64, generator=generator, dtype=torch.float64)
    exact = float(exact_jsd(z_p.tolist(), z_q.tolist()))
    assert exact == pytest.approx(distance**2 / 8 / LN2, rel=0.9)
    # Entropies would cancel to a few eps of log2(64) = 6 bits; here only the roundings of single terms are left.
    assert abs(jsd_bits(z_p, z_q, 1.0).item() - exact) <= 2.0**-52
    in_single = jsd_bits(z_p.float(), z_q.float(), 1.0).item()
    assert abs(in_single - float(exact_jsd(z_p.float().tolist(), z_q.float().tolist()))) <= 2.0**-23


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_gradient_is_the_published_closed_form(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    z_p, z_q = scale * torch.randn(2, 5, 20, generator=generator, dtype=torch.float64)
    beta = 1 + torch.rand(5, generator=generator, dtype=torch.float64)
    upstream = torch.randn(5, generator=generator, dtype=torch.float64)
    z_p.requires_grad_()
    (jsd_bits(z_p, z_q, beta) * upstream).sum().backward()
    with torch.no_grad():
        p, q = (z_p / beta[:, None]).softmax(-1), (z_q / beta[:, None]).softmax(-1)
        log_ratio = (2 * p / (p + q)).log()
        kl = (p * log_ratio).sum(-1, keepdim=True)
        expected = p * (log_ratio - kl) * (upstream / (2 * beta * LN2))[:, None]
    torch.testing.assert_close(z_p.grad, expected, rtol=1e-9, atol=1e-15)


def test_gradients_of_every_argument_against_differences():
    z_p, z_q = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    beta = double([1.0, 1.5, 2.5])
    inputs = [t.requires_grad_() for t in (z_p.clone(), z_q.clone(), beta)]
    assert torch.autograd.gradcheck(jsd_bits, inputs)
    assert torch.autograd.gradgradcheck(jsd_bits, inputs)


def test_loss_by_hand():
    log_probs, jsd = double([-1.0, -0.5, -0.25]), double([0.5, 0.125])
    by_hand = (Fraction(7, 4) + Fraction(1, 50) * Fraction(5, 8)) / 5
    assert kpig_loss(log_probs, jsd, 0.02, 5).item() == pytest.approx(float(by_hand), rel=1e-15)


def test_loss_without_divergence_is_the_mean_cross_entropy():
    z, targets = torch.randn(6, 9, generator=torch.Generator().manual_seed(4)).double(), torch.arange(6)
    log_probs = z.log_softmax(-1)[targets, targets]
    expected = torch.nn.functional.cross_entropy(z, targets)
    assert kpig_loss(log_probs, torch.zeros(0), 0.02, 6).item() == pytest.approx(expected.item(), rel=1e-14)


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(0, 1)), min_size=1, max_size=30), st.integers(0, 30))
@settings(deadline=None)
def test_losses_of_the_parts_add_up_to_the_loss_of_the_batch(rows, cut):
    log_probs, jsd = double(rows).T
    n = torch.tensor(len(rows))
    whole = kpig_loss(log_probs, jsd, 0.02, len(rows)).item()
    parts = kpig_loss(log_probs[:cut], jsd[:cut], 0.02, n) + kpig_loss(log_probs[cut:], jsd[cut:], 0.02, n)
    assert parts.item() == pytest.approx(whole, rel=1e-13)


def test_loss_sends_gradient_to_both_terms():
    log_probs, jsd = torch.zeros(4, requires_grad=True), torch.zeros(2, requires_grad=True)
    kpig_loss(log_probs, jsd, 0.5, 4).backward()
    assert log_probs.grad is not None
    assert jsd.grad is not None
    assert log_probs.grad.tolist() == [-0.25] * 4
    assert jsd.grad.tolist() == [0.125] * 2
