"""Intervals and tests against numbers worked out by hand, exact enumeration, and simulations with known truth."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kpig_fast.evaluation.metrics import Tally, mean_tally, tally
from kpig_fast.evaluation.statistics import (
    N_DRAWS,
    Estimate,
    between_answers,
    between_seeds,
    draw,
    holm,
    over_answers,
    over_seeds,
)


def right(*answers: int) -> Tally:
    """Answers of a task, 1 for a right one."""
    return mean_tally([100.0 * one for one in answers])


def estimate(tasks: dict[str, Tally]) -> Estimate:
    return over_answers([one.value for one in tasks.values()], [draw(name, one) for name, one in tasks.items()])


def test_the_figure_of_two_answers_is_drawn_as_a_coin_is_tossed_twice():
    draws = draw("a", right(0, 1))
    assert draws is not None
    assert len(draws) == N_DRAWS
    # 0, 50 and 100 with probabilities 1/4, 1/2, 1/4; four standard deviations of such shares.
    for value, share in ((0, 1 / 4), (50, 1 / 2), (100, 1 / 4)):
        assert np.mean(draws == value) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / N_DRAWS))
    assert estimate({"a": right(0, 1)}) == Estimate(50, 0, 100)


def test_many_answers_have_the_interval_of_the_normal_approximation():
    found = estimate({"a": right(*[1] * 200, *[0] * 200)})
    # Standard deviation sqrt(0.25 / 400) = 2.5 points; 0.6 is four standard deviations of a quantile of 2,000 draws.
    assert found.value == 50
    assert found.low == pytest.approx(50 - 1.96 * 2.5, abs=0.6)
    assert found.high == pytest.approx(50 + 1.96 * 2.5, abs=0.6)


def test_tasks_weigh_the_same_and_stay_as_they_are():
    # The variance is that of the small task: (50 / sqrt(100) / 2)^2, because the other task never varies.
    found = estimate({"small": right(*[1, 0] * 50), "large": right(*[1] * 900)})
    assert found.value == 75
    assert found.low == pytest.approx(75 - 1.96 * 2.5, abs=0.6)
    assert found.high == pytest.approx(75 + 1.96 * 2.5, abs=0.6)


def test_one_answer_tells_nothing_of_how_answers_vary():
    assert draw("a", right(1)) is None
    assert estimate({"a": right(1), "b": right(0, 1)}) == Estimate(75)


def test_answers_that_all_fare_alike_have_no_width():
    assert estimate({"a": right(1, 1, 1)}) == Estimate(100, 100, 100)


def test_without_tasks_there_is_no_estimate():
    with pytest.raises(ValueError, match="no task has this figure"):
        over_answers([], [])


def test_bleu_is_drawn_as_a_corpus():
    answers, references = ["the cat sat on the mat", "a dog ran off"], [["the cat sat on the mat"], ["it rained"]]
    found = tally("bleu", answers, references)
    assert found is not None
    draws = draw("a", found)
    assert draws is not None
    # Twice the first, twice the second, and both: not a mean of the two.
    assert set(np.round(draws, 9)) == {100.0, 0.0, round(found.value, 9)}
    assert found.value not in (0, 50, 100)


tasks = st.dictionaries(
    st.text(min_size=1), st.lists(st.integers(0, 1), min_size=2, max_size=6), min_size=1, max_size=4
)


@given(tasks=tasks, data=st.data())
def test_the_order_of_tasks_does_not_matter(tasks, data):
    tallies = {name: right(*answers) for name, answers in tasks.items()}
    shuffled = {name: tallies[name] for name in data.draw(st.permutations(list(tallies)))}
    first, second = estimate(tallies), estimate(shuffled)
    assert (first.value, first.low, first.high) == pytest.approx((second.value, second.low, second.high))
    assert first.low <= first.value + 1e-9
    assert first.value - 1e-9 <= first.high


def test_the_interval_over_answers_covers_the_truth():
    rng, truth, trials = np.random.default_rng(0), {"a": 0.5, "b": 0.7, "c": 0.85}, 400
    covered = 0
    for _ in range(trials):
        found = estimate({name: right(*(rng.random(40) < p)) for name, p in truth.items()})
        covered += found.low <= 100 * np.mean(list(truth.values())) <= found.high
    # A percentile interval of 40 answers is too narrow by sqrt(39 / 40), which covers 94.7 %; minus or plus four
    # standard deviations of 400 trials.
    assert abs(covered / trials - 0.947) <= 4 * math.sqrt(0.05 * 0.95 / trials)


def test_swapping_every_answer_of_four_is_one_case_in_sixteen():
    found = between_answers({"a": right(1, 1, 1, 1)}, {"a": right(0, 0, 0, 0)})
    assert (found.value, found.low, found.high) == (100, 100, 100)
    assert (found.test, found.n, found.wilcoxon) == ("permutation", 4, None)
    # All or none swapped: 2 / 16; four standard deviations.
    assert found.p == pytest.approx(1 / 8, abs=4 * math.sqrt(1 / 8 * 7 / 8 / N_DRAWS))


def test_the_permutation_test_is_that_of_exact_enumeration():
    rng = np.random.default_rng(1)
    sizes = {"a": 4, "b": 7}
    ours = {name: mean_tally(rng.uniform(20, 100, size).tolist()) for name, size in sizes.items()}
    theirs = {name: mean_tally(rng.uniform(0, 80, size).tolist()) for name, size in sizes.items()}

    def flat(side):
        return np.concatenate([one.counts[:, 0] for one in side.values()])

    def statistic(x, y, axis):
        gaps = x - y
        return (gaps[..., :4].mean(-1) + gaps[..., 4:].mean(-1)) / 2

    exact = stats.permutation_test(
        (flat(ours), flat(theirs)), statistic, permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    found = between_answers(ours, theirs)
    assert found.value == pytest.approx(float(exact.statistic))
    assert 0.001 < exact.pvalue < 0.5
    assert found.p == pytest.approx(exact.pvalue, abs=4 * math.sqrt(exact.pvalue * (1 - exact.pvalue) / N_DRAWS))


def test_the_paired_interval_leaves_out_what_both_sides_share():
    hard = [0, 1] * 100
    better = [*[1] * 20, *hard[20:]]
    found = between_answers({"a": right(*better)}, {"a": right(*hard)})
    # 10 of 200 answers gained: mean 5 points, standard deviation 100 sqrt(0.05 * 0.95 / 200) = 1.54.
    assert found.value == pytest.approx(5)
    assert found.low == pytest.approx(5 - 1.96 * 1.54, abs=0.6)
    assert found.high == pytest.approx(5 + 1.96 * 1.54, abs=0.6)
    # Ten swaps with the same sign: 2 / 1024.
    assert found.p < 0.01


def test_equal_answers_do_not_differ():
    same = {"a": right(1, 0, 1), "b": right(0, 0)}
    found = between_answers(same, same)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


@given(tasks=tasks, data=st.data())
def test_the_other_way_round_is_the_negative(tasks, data):
    ours = {name: right(*answers) for name, answers in tasks.items()}
    theirs = {
        name: right(*data.draw(st.lists(st.integers(0, 1), min_size=len(answers), max_size=len(answers))))
        for name, answers in tasks.items()
    }
    forth, back = between_answers(ours, theirs), between_answers(theirs, ours)
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low))
    assert back.p == forth.p
    assert 0 < forth.p <= 1


def test_without_a_difference_the_test_rarely_finds_one():
    rng, trials = np.random.default_rng(2), 300
    false = 0
    for _ in range(trials):
        ours, theirs = (mean_tally(rng.uniform(0, 100, 30).tolist()) for _ in range(2))
        false += between_answers({"a": ours}, {"a": theirs}).p <= 0.05
    assert abs(false / trials - 0.05) <= 4 * math.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize("theirs", [{}, {"b": right(0, 1)}, {"a": right(0, 1, 1)}])
def test_unpaired_answers_are_refused(theirs):
    with pytest.raises(ValueError, match="answers to the same rows"):
        between_answers({"a": right(0, 1)}, theirs)


def test_nothing_cannot_be_compared():
    with pytest.raises(ValueError, match="the tasks or their numbers"):
        between_answers({}, {})


def test_interval_over_seeds_by_hand():
    found = over_seeds([1.0, 2.0, 3.0])
    # Standard deviation 1; Student's quantile for two degrees of freedom is 0.95 / sqrt(2 * 0.975 * 0.025).
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))


def test_one_seed_has_no_interval_and_none_no_mean():
    assert over_seeds([7.0]) == Estimate(7.0)
    with pytest.raises(ValueError, match="no values"):
        over_seeds([])


def test_two_seeds_by_hand():
    found = between_seeds([11.0, 23.0], [10.0, 20.0])
    # Differences 1 and 3: t = 2 with one degree of freedom, whose distribution is Cauchy's.
    assert found.value == 2
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert found.high - found.value == pytest.approx(math.tan(math.pi * (0.975 - 0.5)))
    assert (found.test, found.n, found.wilcoxon) == ("t", 2, None)


def test_three_seeds_by_hand():
    # Differences 2, 3, 4: t^2 = 27 with two degrees of freedom.
    assert between_seeds([3.0, 5.0, 7.0], [1.0, 2.0, 3.0]).p == pytest.approx(1 - math.sqrt(27 / 29))


def test_the_signed_rank_test_comes_from_six_seeds_on():
    theirs = [0.0] * 6
    ours = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    # All six signs alike: 2 / 64.
    assert between_seeds(ours, theirs).wilcoxon == pytest.approx(2 / 64)
    assert between_seeds(ours[:5], theirs[:5]).wilcoxon is None


def test_differences_without_spread_have_no_p_value():
    found = between_seeds([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert found.p is None
    assert found.value == pytest.approx(0.1)
    assert between_seeds([1.0] * 6, [1.0] * 6).wilcoxon is None


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_seeds_without_partners_are_refused(ours, theirs):
    with pytest.raises(ValueError, match=f"{len(ours)} and {len(theirs)} seeds"):
        between_seeds(ours, theirs)


def test_holm_by_hand():
    # Smallest times 3, next times 2, the last not below the one before it.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_only_raises_keeps_the_order_and_is_at_most_bonferroni(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= min(1, len(p_values) * p) for p, c in zip(p_values, corrected))
    by_p = [c for _, c in sorted(zip(p_values, corrected))]
    assert by_p == sorted(by_p)
