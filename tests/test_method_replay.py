"""Drawing, choosing and the plan: independence between tasks, identical bytes, errors."""

import json
import math
from collections import Counter
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpig_fast.method.replay import Draw, ReplayPlan, assign_instructions, choose, draw, make_plan

ROWS = [f"row-{i}" for i in range(200)]

names = st.text(max_size=8)
row_lists = st.lists(st.text(max_size=5), unique=True, max_size=40)
seeds = st.integers(0, 2**31)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


def plan_of(gains: dict[str, list[float]], *, m: int = 2) -> ReplayPlan:
    drawn = [one for task, values in gains.items() for one in draw(task, ROWS, 31, n=len(values), seed=0, step=3)]
    return make_plan(
        drawn,
        [gain for values in gains.values() for gain in values],
        step=3,
        seed=0,
        alpha=0.3,
        n_replay_tasks=m,
        n_per_task=max(map(len, gains.values()), default=0),
        model_hash="abc",
    )


@given(names, row_lists, st.integers(1, 31), st.integers(0, 50), seeds, st.integers(0, 100))
def test_draw_takes_different_rows_of_the_task_and_wordings_of_its_pool(task, rows, pool, n, seed, step):
    drawn = draw(task, rows, pool, n=n, seed=seed, step=step)
    ids = [one.row_id for one in drawn]
    assert len(ids) == len(set(ids)) == min(n, len(rows))
    assert set(ids) <= set(rows)
    assert all(one.task == task and 0 <= one.instruction < pool for one in drawn)


@given(names, row_lists, st.randoms(use_true_random=False), st.integers(0, 50), seeds)
def test_draw_depends_neither_on_row_order_nor_on_how_many_are_wanted(task, rows, random, n, seed):
    shuffled = list(rows)
    random.shuffle(shuffled)
    drawn = draw(task, rows, 31, n=n, seed=seed, step=1)
    assert draw(task, shuffled, 31, n=n, seed=seed, step=1) == drawn
    assert draw(task, rows, 31, n=len(rows), seed=seed, step=1)[:n] == drawn


def test_draw_of_a_row_is_not_moved_by_rows_that_are_not_drawn():
    drawn = draw("a", ROWS, 31, n=10, seed=0, step=1)
    left = [row for row in ROWS if row in {one.row_id for one in drawn} or row.endswith("7")]
    assert draw("a", left, 31, n=10, seed=0, step=1) == drawn


@pytest.mark.parametrize(("task", "seed", "step"), [("b", 0, 1), ("a", 1, 1), ("a", 0, 2)])
def test_each_task_seed_and_step_draws_its_own(task, seed, step):
    first, second = draw("a", ROWS, 31, n=20, seed=0, step=1), draw(task, ROWS, 31, n=20, seed=seed, step=step)
    assert [one.row_id for one in first] != [one.row_id for one in second]
    assigned = assign_instructions("a", ROWS, 31, seed=0, step=1)
    assert assigned != assign_instructions(task, ROWS, 31, seed=seed, step=step)


def test_neighbouring_fields_cannot_be_mistaken_for_each_other():
    assert draw("a", ROWS, 31, n=20, seed=1, step=11) != draw("a", ROWS, 31, n=20, seed=11, step=1)


def test_draws_stay_the_same_in_every_version():
    """A step that is run again years later must train on the same rows."""
    drawn = draw("task", [f"row-{i}" for i in range(10)], 31, n=4, seed=0, step=1)
    assert [(one.row_id, one.instruction) for one in drawn] == [
        ("row-8", 2),
        ("row-5", 14),
        ("row-3", 29),
        ("row-4", 28),
    ]


def test_draws_spread_evenly_over_rows_and_wordings():
    counts = Counter(one.row_id for step in range(2000) for one in draw("a", ROWS[:20], 5, n=5, seed=0, step=step))
    # Each row is drawn in 1/4 of 2000 steps: 500 +- 19.4, here 5 standard deviations.
    assert all(abs(counts[row] - 500) < 97 for row in ROWS[:20])
    wordings = Counter(assign_instructions("a", [str(i) for i in range(10_000)], 5, seed=0, step=0))
    assert all(abs(wordings[i] - 2000) < 200 for i in range(5))


def test_instructions_go_with_their_row():
    assigned = dict(zip(ROWS, assign_instructions("a", ROWS, 31, seed=4, step=2)))
    assert len(set(assigned.values())) == 31
    assert assign_instructions("a", ROWS[::-1], 31, seed=4, step=2) == [assigned[row] for row in ROWS[::-1]]
    assert all(assigned[one.row_id] == one.instruction for one in draw("a", ROWS, 31, n=9, seed=4, step=2))


def test_a_pool_of_one_wording_is_always_asked_with_it():
    assert assign_instructions("a", ROWS, 1, seed=0, step=0) == [0] * len(ROWS)


@given(st.dictionaries(names, finite, max_size=12), st.integers(0, 15))
def test_choose_takes_the_lowest_gains_in_order(mean_gains, m):
    chosen = choose(mean_gains, m)
    assert len(chosen) == min(m, len(mean_gains))
    keys = [(mean_gains[task], task) for task in chosen]
    assert keys == sorted(keys)
    assert all(key <= (gain, task) for task, gain in mean_gains.items() if task not in chosen for key in keys)


def test_choose_breaks_ties_by_name_whatever_the_order():
    assert choose({"c": 0.1, "a": 0.1, "b": 0.1, "z": -0.2}, 3) == ["z", "a", "b"]
    assert choose({"z": -0.2, "b": 0.1, "a": 0.1, "c": 0.1}, 3) == ["z", "a", "b"]


def test_plan_worked_out_by_hand():
    gains = {"high": [0.5, 0.25], "low": [-0.5, 0.25], "middle": [0.125, 0.0], "top": [1.0]}
    plan = plan_of(gains, m=3)
    means = {task: float(sum(map(Fraction, values)) / len(values)) for task, values in gains.items()}
    assert plan.mean_gains == means == {"high": 0.375, "low": -0.125, "middle": 0.0625, "top": 1.0}
    assert plan.chosen == ("low", "middle", "high")
    assert plan.replayed == [one for task in plan.chosen for one in draw(task, ROWS, 31, n=2, seed=0, step=3)]
    assert plan.gains == (0.5, 0.25, -0.5, 0.25, 0.125, 0.0, 1.0)
    assert Counter(one.task for one in plan.drawn) == {"high": 2, "low": 2, "middle": 2, "top": 1}


def test_fewer_earlier_tasks_than_wanted_are_all_replayed_and_none_gives_an_empty_plan():
    assert plan_of({"b": [0.2], "a": [0.3]}, m=10).chosen == ("b", "a")
    empty = plan_of({})
    assert (empty.drawn, empty.gains, empty.mean_gains, empty.chosen, empty.replayed) == ((), (), {}, (), [])
    assert ReplayPlan.from_json(empty.to_json()) == empty


def test_mean_gain_does_not_depend_on_the_order_of_summing():
    values = [1e16, 1.0, -1e16, 1.0]
    assert plan_of({"a": values}).mean_gains == plan_of({"a": values[::-1]}).mean_gains == {"a": 0.5}


@given(st.dictionaries(names, st.lists(finite, min_size=1, max_size=4), max_size=5), st.integers(0, 6))
def test_plan_survives_json_with_identical_bytes(gains, m):
    plan = plan_of(gains, m=m)
    text = plan.to_json()
    assert text == plan_of(gains, m=m).to_json()
    assert ReplayPlan.from_json(text) == plan
    assert ReplayPlan.from_json(text).to_json() == text
    assert text.endswith("}\n")
    assert text.isascii()


def test_plan_json_has_sorted_keys_and_every_field():
    text = plan_of({"a": [0.1]}).to_json()
    fields = json.loads(text)
    assert list(fields) == sorted(fields)
    assert set(fields) == set(ReplayPlan.__dataclass_fields__)
    assert fields["gains"] == [0.1]
    assert '"gains": [\n  0.1\n ]' in text


def test_integers_among_the_numbers_do_not_change_the_bytes():
    common = {"step": 1, "seed": 0, "n_replay_tasks": 1, "n_per_task": 1, "model_hash": "h"}
    drawn = [Draw("a", "r", 0)]
    assert make_plan(drawn, [1], alpha=1, **common).to_json() == make_plan(drawn, [1.0], alpha=1.0, **common).to_json()


def test_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        plan_of({"a": [0.1]}).chosen = ()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("gain", [math.nan, math.inf, -math.inf])
def test_a_gain_that_is_no_number_names_its_task(gain):
    with pytest.raises(ValueError, match=rf"task 'bad' has mean gain {gain}; check the model"):
        choose({"good": 0.1, "bad": gain}, 2)
    with pytest.raises(ValueError, match=r"task 'bad' has mean gain"):
        plan_of({"good": [0.1], "bad": [0.2, gain]})


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match="number of replayed tasks is -1"):
        choose({}, -1)
    with pytest.raises(ValueError, match="number of instances drawn per task is -2"):
        draw("a", ROWS, 31, n=-2, seed=0, step=0)
    with pytest.raises(ValueError, match="task 'a' has 0 instructions; its pool needs at least one"):
        draw("a", ROWS, 0, n=1, seed=0, step=0)
    with pytest.raises(ValueError, match="1 drawn instances but 2 gains"):
        make_plan(
            [Draw("a", "r", 0)],
            [0.1, 0.2],
            step=0,
            seed=0,
            alpha=0.3,
            n_replay_tasks=1,
            n_per_task=1,
            model_hash="h",
        )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"drawn": [{"task": "a"}]}', '{"drawn": [], "gains": []}', "null"])
def test_text_that_is_no_plan_says_so(text):
    with pytest.raises(ValueError, match=r"no replay plan \(.*\); delete the file"):
        ReplayPlan.from_json(text)


def test_an_unknown_field_is_named():
    fields = json.loads(plan_of({"a": [0.1]}).to_json()) | {"lambda": 1}
    with pytest.raises(ValueError, match="lambda"):
        ReplayPlan.from_json(json.dumps(fields))
