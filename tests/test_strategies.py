"""What each strategy replays, with gains that are made up."""

import pytest

from kpig_fast.method.replay import draw
from kpig_fast.training.strategies import STRATEGIES, PlanRequest

TASKS = ("a", "b", "c", "d")
GAINS = {"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.4}


def request(step: int = 4, earlier=TASKS, m: int = 2, n: int = 3) -> PlanRequest:
    def refuse(drawn):
        raise AssertionError("only kpig measures gains")

    return PlanRequest(
        step=step,
        seed=5,
        alpha=0.3,
        n_replay_tasks=m,
        n_per_task=n,
        model_hash="h",
        earlier=tuple(earlier),
        draw=lambda task: draw(task, [f"{task}{i}" for i in range(9)], 2, n=n, seed=5, step=step),
        measure=refuse,
    )


def measured(**kwargs) -> PlanRequest:
    from dataclasses import replace

    return replace(request(**kwargs), measure=lambda drawn: [GAINS[one.task] for one in drawn])


def test_kpig_replays_the_tasks_with_the_least_gain():
    plan = STRATEGIES["kpig"].plan(measured())
    assert plan.chosen == ("b", "c")
    assert [one.task for one in plan.replayed] == ["b"] * 3 + ["c"] * 3
    assert len(plan.drawn) == 12
    assert plan.mean_gains == pytest.approx(GAINS)


@pytest.mark.parametrize("name", ["sft", "joint"])
def test_some_replay_nothing(name):
    plan = STRATEGIES[name].plan(request())
    assert plan.replayed == []
    assert plan.chosen == ()


def test_replay_takes_as_much_as_kpig_at_random_but_reproducibly():
    plans = [STRATEGIES["replay"].plan(request(step=step)) for step in range(30)]
    assert plans == [STRATEGIES["replay"].plan(request(step=step)) for step in range(30)]
    assert all(len(plan.replayed) == 6 and len(set(plan.chosen)) == 2 for plan in plans)
    assert {task for plan in plans for task in plan.chosen} == set(TASKS)


@pytest.mark.parametrize("name", ["kpig", "replay"])
def test_fewer_earlier_tasks_than_asked_are_all_replayed(name):
    assert STRATEGIES[name].plan(measured(earlier=("c",))).chosen == ("c",)
    assert STRATEGIES[name].plan(measured(earlier=())).replayed == []


def test_only_kpig_distils_and_only_joint_is_one_step():
    assert [name for name, strategy in STRATEGIES.items() if strategy.distils] == ["kpig"]
    assert [name for name, strategy in STRATEGIES.items() if strategy.joint] == ["joint"]
