"""The parts of InsCL: distance between sets of instructions, shares of a budget, information of an instruction."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpig_fast.training.strategies.inscl import insinfo, shares, wasserstein


def random_vectors(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 5))


def cosine_cost(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("seed", range(5))
def test_sets_of_one_size_are_matched_at_the_least_cost(seed: int) -> None:
    a, b = random_vectors(5, seed), random_vectors(5, seed + 100)
    costs = [np.mean([cosine_cost(x, b[j]) for x, j in zip(a, order)]) for order in permutations(range(5))]
    assert wasserstein(a, b) == pytest.approx(min(costs), abs=1e-9)
    assert wasserstein(b, a) == pytest.approx(wasserstein(a, b), abs=1e-9)


def test_a_repeated_set_is_no_distance_away_and_lengths_do_not_count() -> None:
    a = random_vectors(3, 0)
    assert wasserstein(a, np.concatenate([a * 7, a])) == pytest.approx(0, abs=1e-9)


def test_one_against_many_is_the_mean_cost() -> None:
    a, b = random_vectors(1, 1), random_vectors(4, 2)
    assert wasserstein(a, b) == pytest.approx(np.mean([cosine_cost(a[0], x) for x in b]), abs=1e-9)


@pytest.mark.parametrize("bad", [np.zeros((1, 5)), np.full((1, 5), np.nan), np.zeros((0, 5))])
def test_what_is_no_direction_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="embeddings"):
        wasserstein(bad, random_vectors(2, 0))


def test_shares_grow_with_the_distance() -> None:
    plenty = dict.fromkeys("abc", 100)
    assert shares({"a": 1.0, "b": 2.0, "c": 1.0}, 8, plenty) == {"a": 2, "b": 4, "c": 2}
    assert shares({"a": 0.0, "b": 0.0, "c": 0.0}, 3, plenty) == {"a": 1, "b": 1, "c": 1}
    assert shares({"a": 1.0, "b": 1.0, "c": 1.0}, 4, plenty) == {"a": 2, "b": 1, "c": 1}


def test_what_a_task_lacks_goes_to_the_others() -> None:
    assert shares({"a": 8.0, "b": 1.0, "c": 1.0}, 10, {"a": 2, "b": 9, "c": 9}) == {"a": 2, "b": 4, "c": 4}
    assert shares({"a": 1.0}, 10, {"a": 3}) == {"a": 3}
    assert shares({}, 10, {}) == {}


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 20)), min_size=1, max_size=8),
    st.integers(0, 60),
)
def test_a_budget_is_spent_as_far_as_there_are_instances(tasks: list[tuple[float, int]], budget: int) -> None:
    distances = {str(i): distance for i, (distance, _) in enumerate(tasks)}
    available = {str(i): count for i, (_, count) in enumerate(tasks)}
    parts = shares(distances, budget, available)
    assert sum(parts.values()) == min(budget, sum(available.values()))
    assert all(0 <= parts[task] <= available[task] for task in parts)


def test_rare_tags_inform_more() -> None:
    found = insinfo([["a"], ["a", "b"], ["a", "a"], []])
    assert found == pytest.approx([math.log(4 / 3), math.log(4 / 3) + math.log(4), math.log(4 / 3), 0])
