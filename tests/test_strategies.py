"""What each strategy replays, with measures that are made up."""

from dataclasses import replace

import numpy as np
import pytest

from kpig_fast.data.schema import PoolInstruction
from kpig_fast.method.replay import ReplayPlan, draw
from kpig_fast.training.strategies import STRATEGIES, PlanRequest

TASKS = ("a", "b", "c", "d")
GAINS = {"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.4}
# Of a task's two wordings the second has a key part that no other task has.
POOL = {
    name: (
        PoolInstruction(text=f"do {name}", key_parts=("do",)),
        PoolInstruction(text=f"{name} now", key_parts=(name,)),
    )
    for name in (*TASKS, "new")
}
# The angle of each task's instructions from those of the new one.
ANGLES = {"a": 0.0, "b": 0.2, "c": 0.8, "d": 1.5, "new": 0.0}


def refuse(_):
    raise AssertionError("this strategy measures nothing of the kind")


def request(step: int = 4, earlier=TASKS, m: int = 2, n: int = 3, **measures) -> PlanRequest:
    refused = {"gains": refuse, "entropies": refuse, "embed": refuse}
    return PlanRequest(
        step=step,
        seed=5,
        alpha=0.3,
        n_replay_tasks=m,
        n_per_task=n,
        model_hash="h",
        earlier=tuple(earlier),
        new=("new",),
        pool=POOL.__getitem__,
        draw=lambda task, n: draw(
            task, [f"{task}{i}" for i in range(9)], 2, n=9 if n is None else n, seed=5, step=step
        ),
        **(refused | measures),
    )


def with_gains(**kwargs) -> PlanRequest:
    return request(gains=lambda drawn: [GAINS[one.task] for one in drawn], **kwargs)


def with_entropies(**kwargs) -> PlanRequest:
    # Rows of higher number are less sure.
    return request(entropies=lambda drawn: [float(one.row_id[1:]) for one in drawn], **kwargs)


def with_vectors(**kwargs) -> PlanRequest:
    def embed(texts):
        angles = [ANGLES[next(name for name in ANGLES if name in text.split())] for text in texts]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles])

    return request(embed=embed, **kwargs)


MEASURED = {"kpig": with_gains, "replay": request, "entropy": with_entropies, "inscl": with_vectors}


def test_kpig_replays_the_tasks_with_the_least_gain():
    plan = STRATEGIES["kpig"].plan(with_gains())
    assert plan.chosen == ("b", "c")
    assert [one.task for one in plan.replayed] == ["b"] * 3 + ["c"] * 3
    assert len(plan.drawn) == 12
    assert plan.mean_gains == pytest.approx(GAINS)


def test_entropy_replays_the_instances_with_the_highest():
    asked = with_entropies()
    plan = STRATEGIES["entropy"].plan(asked)
    numbers = sorted((int(one.row_id[1:]) for one in asked.draw_all()), reverse=True)
    assert [int(one.row_id[1:]) for one in plan.drawn] == numbers[:6]
    assert sorted(plan.replayed, key=str) == sorted(plan.drawn, key=str)
    assert set(plan.measured) == set(TASKS)


def test_inscl_replays_more_of_what_is_farther_and_rare_wordings_first():
    asked = with_vectors(m=4, n=4)
    plan = STRATEGIES["inscl"].plan(asked)
    counts = {task: sum(one.task == task for one in plan.replayed) for task in TASKS}
    assert counts["a"] == 0
    assert counts["a"] <= counts["b"] <= counts["c"] < counts["d"]
    assert plan.measured == pytest.approx({task: 1 - np.cos(ANGLES[task]) for task in TASKS}, abs=1e-9)
    rare = {one for task in TASKS for one in asked.draw(task, None) if one.instruction == 1}
    for task in TASKS:
        taken = [one for one in plan.replayed if one.task == task]
        of_task = [one for one in rare if one.task == task]
        assert sum(one in rare for one in taken) == min(len(taken), len(of_task))


@pytest.mark.parametrize("name", ["sft", "joint", "l2", "ewc"])
def test_some_replay_nothing(name):
    plan = STRATEGIES[name].plan(request())
    assert plan.replayed == []
    assert plan.chosen == ()


def test_replay_takes_random_tasks():
    plans = [STRATEGIES["replay"].plan(request(step=step)) for step in range(30)]
    assert all(len(set(plan.chosen)) == 2 for plan in plans)
    assert {task for plan in plans for task in plan.chosen} == set(TASKS)


@pytest.mark.parametrize("name", MEASURED)
def test_the_budget_is_the_same_and_plans_are_reproducible(name):
    plan = STRATEGIES[name].plan(MEASURED[name]())
    assert len(plan.replayed) == 6
    assert STRATEGIES[name].plan(MEASURED[name]()).to_json() == plan.to_json()
    assert ReplayPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", MEASURED)
def test_fewer_earlier_tasks_than_asked_are_all_replayed(name):
    assert set(STRATEGIES[name].plan(MEASURED[name](earlier=("c",))).chosen) == {"c"}
    assert STRATEGIES[name].plan(MEASURED[name](earlier=())).replayed == []


def test_nothing_to_replay_when_none_is_asked():
    for name, measured in MEASURED.items():
        assert STRATEGIES[name].plan(replace(measured(), n_per_task=0)).replayed == []


def test_what_else_strategies_do():
    assert [name for name, strategy in STRATEGIES.items() if strategy.distils] == ["kpig"]
    assert [name for name, strategy in STRATEGIES.items() if strategy.joint] == ["joint"]
    assert {name: s.penalty for name, s in STRATEGIES.items() if s.penalty} == {"ewc": "fisher", "l2": "plain"}
