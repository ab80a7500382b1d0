"""Information gain against exact fractions, its bound, its tail, and the errors."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kpig_fast.method.gain import gain_bound, gains, info, scored_length

EPS = 2.0**-52

log_probs = st.floats(-30, 0, width=32)
alphas = st.floats(0.01, 1)
responses = st.lists(st.tuples(log_probs, log_probs), max_size=12)


def vectors(probabilities: list[list[Fraction]]) -> list[torch.Tensor]:
    return [torch.tensor([float(p) for p in row], dtype=torch.float64).log() for row in probabilities]


def sides(batch: list[list[tuple[float, float]]], dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    return [[torch.tensor([pair[side] for pair in row], dtype=dtype) for row in batch] for side in (0, 1)]


def test_info_of_a_response_worked_out_by_hand():
    alpha, p = Fraction(3, 10), [Fraction(1, 2), Fraction(1, 4), Fraction(1, 8)]
    by_hand = Fraction(15, 100) + Fraction(9, 400) + Fraction(27, 8000)
    assert by_hand == sum(alpha**k * p_k for k, p_k in enumerate(p, start=1))
    assert info(vectors([p])[0], 0.3) == pytest.approx(float(by_hand), rel=1e-15)


def test_info_of_an_empty_response_is_zero():
    assert info(torch.zeros(0), 0.3) == 0.0


def test_info_starts_the_decay_at_the_first_token():
    assert info(torch.zeros(1), 0.3) == 0.3
    assert info(torch.zeros(2), 0.5) == 0.75


def test_an_impossible_token_adds_nothing():
    assert info(torch.tensor([-math.inf, 0.0]), 0.5) == 0.25


def test_gains_of_ragged_responses_worked_out_by_hand():
    half, third, tenth = Fraction(1, 2), Fraction(1, 3), Fraction(1, 10)
    complete = [[half, third], [], [tenth], [third, half, Fraction(1)]]
    masked = [[third, half], [], [half], [third, half, tenth]]
    alpha = Fraction(3, 5)
    by_hand = [
        Fraction(6, 10) * Fraction(1, 6) - Fraction(36, 100) * Fraction(1, 6),
        Fraction(0),
        -Fraction(6, 10) * Fraction(4, 10),
        Fraction(216, 1000) * Fraction(9, 10),
    ]
    assert by_hand[0] == sum(alpha**k * (c - m) for k, c, m in zip((1, 2), complete[0], masked[0]))
    got = gains(vectors(complete), vectors(masked), float(alpha))
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([float(g) for g in by_hand], rel=1e-14, abs=1e-17)


def test_gains_of_nothing_and_of_only_empty_responses():
    assert gains([], [], 0.3).shape == (0,)
    assert gains([torch.zeros(0)] * 2, [torch.zeros(0)] * 2, 0.3).tolist() == [0.0, 0.0]


def test_gains_sum_in_float64_from_half_precision():
    rows = [torch.full((1000,), -0.001, dtype=torch.bfloat16)]
    single = float(rows[0][0])
    assert gains(rows, [torch.full((1000,), -math.inf)], 1.0).item() == pytest.approx(
        1000 * math.exp(single), rel=1e-13
    )


def test_gains_carry_no_gradient():
    leaf = torch.zeros(3, requires_grad=True)
    assert not gains([leaf], [leaf * 2], 0.3).requires_grad


@settings(deadline=None)
@given(st.lists(st.lists(log_probs, max_size=40), max_size=20), alphas, st.sampled_from([torch.float32, torch.float64]))
def test_gain_is_exactly_zero_when_nothing_is_masked(batch, alpha, dtype):
    rows = [torch.tensor(row, dtype=dtype) for row in batch]
    got = gains(rows, [row.clone() for row in rows], alpha)
    assert torch.equal(got, torch.zeros(len(batch), dtype=torch.float64))


@settings(deadline=None)
@given(st.lists(responses, max_size=8), alphas)
def test_gains_equal_exact_sums_over_each_instance(batch, alpha):
    got = gains(*sides(batch), alpha).tolist()
    for value, row in zip(got, batch, strict=True):
        weights = [Fraction(alpha) ** k for k in range(1, len(row) + 1)]
        terms = [w * (Fraction(math.exp(c)) - Fraction(math.exp(m))) for w, (c, m) in zip(weights, row)]
        # Every term carries a few roundings (exp, power, product) and the sum one per token.
        slack = (len(row) + 8) * EPS * float(sum(weights))
        assert abs(value - float(sum(terms))) <= slack


@settings(deadline=None)
@given(st.lists(responses, min_size=1, max_size=6), alphas)
def test_gain_is_the_difference_of_infos_and_changes_sign_with_the_sides(batch, alpha):
    complete, masked = sides(batch)
    forth, back = gains(complete, masked, alpha), gains(masked, complete, alpha)
    assert torch.equal(forth, -back)
    for value, c, m in zip(forth.tolist(), complete, masked):
        assert value == pytest.approx(info(c, alpha) - info(m, alpha), abs=1e-14)


@settings(deadline=None)
@given(st.lists(st.sampled_from([(0.0, -math.inf), (-math.inf, 0.0), (0.0, -1.0)]), max_size=200), alphas)
def test_gain_stays_within_its_bound(row, alpha):
    value = abs(gains(*sides([row]), alpha).item())
    reached = sum((Fraction(alpha) ** k for k in range(1, len(row) + 1)), Fraction(0))
    # The sum over the tokens there are is the sharper bound; it may be met, and then rounding can step over it.
    assert value <= float(reached) * (1 + (len(row) + 8) * EPS)
    assert value <= gain_bound(alpha) * (1 + (len(row) + 8) * EPS)


@given(alphas.filter(lambda alpha: alpha < 1))
def test_gain_bound_is_the_limit_of_all_weights(alpha):
    exact = Fraction(alpha) / (1 - Fraction(alpha))
    assert abs(Fraction(gain_bound(alpha)) / exact - 1) <= EPS


def test_the_bound_is_reached_by_a_certain_answer_that_masking_makes_impossible():
    certain, impossible = [torch.zeros(400)], [torch.full((400,), -math.inf)]
    for alpha in (0.05, 0.3, 0.6, 0.9):
        assert gains(certain, impossible, alpha).item() == pytest.approx(gain_bound(alpha), rel=1e-14)


def test_gain_bound_by_hand():
    assert gain_bound(0.5) == 1.0
    assert gain_bound(0.6) == pytest.approx(1.5, rel=1e-15)
    assert gain_bound(1) == math.inf


@pytest.mark.parametrize(("alpha", "tokens"), [(0.3, 14), (0.6, 34)])
def test_scored_length_of_the_published_alphas(alpha, tokens):
    assert scored_length(alpha, 1e-7) == tokens


def test_scored_length_needs_every_token_without_tolerance_or_without_decay():
    assert scored_length(0.3, 0) is None
    assert scored_length(1.0, 1e-7) is None


def test_scored_length_keeps_one_token_under_any_tolerance():
    assert scored_length(0.3, 1e6) == 1


@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-300, 1e3))
def test_scored_length_bounds_the_ignored_tail_and_wastes_no_token(alpha, tol):
    k = scored_length(alpha, tol)
    assert k is not None
    log_alpha, log_rest = math.log(alpha), math.log1p(-alpha)
    # In logarithms, where the exact powers would be fractions of millions of digits.
    rounding = 1e-12 * max(1, k) * abs(log_alpha) + 1e-12
    assert (k + 1) * log_alpha - log_rest <= math.log(tol) + rounding
    assert k == 1 or (k - 1) * log_alpha - log_rest > math.log(tol) - rounding


@given(st.fractions(Fraction(1, 20), Fraction(19, 20), max_denominator=20), st.integers(1, 12))
def test_ignored_tail_in_exact_arithmetic(alpha, digits):
    decay, tol = float(alpha), 10.0**-digits
    k = scored_length(decay, tol)
    assert k is not None
    assert Fraction(decay) ** (k + 1) / (1 - Fraction(decay)) <= Fraction(tol)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.3, 0.6, 0.9]), st.sampled_from([1e-7, 1e-4, 1e-2]))
def test_truncated_gain_is_within_the_tolerance(seed, alpha, tol):
    generator = torch.Generator().manual_seed(seed)
    complete, masked = (torch.rand(5, 300, generator=generator, dtype=torch.float64).log() for _ in range(2))
    k = scored_length(alpha, tol)
    whole, cut = gains(list(complete), list(masked), alpha), gains(list(complete[:, :k]), list(masked[:, :k]), alpha)
    assert (whole - cut).abs().max() <= tol


@pytest.mark.parametrize("alpha", [0, -0.3, 1.01, math.nan, math.inf])
def test_alpha_outside_its_range_is_named(alpha):
    for call in (
        lambda: gain_bound(alpha),
        lambda: scored_length(alpha, 1e-7),
        lambda: info(torch.zeros(1), alpha),
        lambda: gains([torch.zeros(1)], [torch.zeros(1)], alpha),
    ):
        with pytest.raises(ValueError, match=rf"alpha is {alpha}; .*\(0, 1\]"):
            call()


@pytest.mark.parametrize("tail_tol", [-1e-7, math.nan, math.inf])
def test_tolerance_outside_its_range_is_named(tail_tol):
    with pytest.raises(ValueError, match=rf"tail_tol is {tail_tol}; .*>= 0"):
        scored_length(0.3, tail_tol)


def test_sides_that_do_not_match_are_named():
    with pytest.raises(ValueError, match="2 complete but 1 masked log-prob vectors"):
        gains([torch.zeros(1)] * 2, [torch.zeros(1)], 0.3)
    with pytest.raises(ValueError, match="instance 1 has 2 complete but 3 masked"):
        gains([torch.zeros(4), torch.zeros(2)], [torch.zeros(4), torch.zeros(3)], 0.3)
