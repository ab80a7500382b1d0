"""Run folders such as ``kpig train`` writes, without any model: a run by hand, and runs that forget in a seeded way."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Metric, Role
from kpig_fast.evaluation.runs import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    PLAN_FILE,
    UNTRAINED,
    StepMetrics,
    mark_complete,
    step_folder,
    write_metrics,
)
from kpig_fast.evaluation.tables import EvaluationResult, TaskResult
from kpig_fast.evaluation.violations import Violation
from kpig_fast.method.replay import Draw, make_plan

SEEN = ("sort words", "count letters", "speaker <User/Agent>", "join & trim", "title_case", "a $1 question")
HELD_OUT = ("sort downwards", "speaker <user/agent>")
# The plots of runs that have every figure, in order.
CURVES = ["p-seen", "p-held-out", "v-seen", "v-held-out", "gain-seen", "gain-held-out"]
STRATEGIES = ("sft", "kpig", "joint")


def task_result(name: str, p: float | None, role: Role = "seen", metric: Metric = "acc", **rates: float) -> TaskResult:
    """Figures of a task with ten answers; ``rates`` are WFR, OOS and WR."""
    by_kind: dict[Violation, float] = {kind: rates[kind] for kind in ("WFR", "OOS", "WR") if kind in rates}
    return TaskResult(name, role, "letters", metric, p, by_kind, 10)


def step_metrics(
    step: int,
    results: Sequence[TaskResult],
    *,
    tasks: Sequence[str] = (),
    gains: dict[str, float] | None = None,
    **rest,
) -> StepMetrics:
    """Metrics of one step; ``rest`` are fields of ``StepMetrics``."""
    fields = {"strategy": "kpig", "replayed": (), **rest}
    return StepMetrics(
        step=step, tasks=tuple(tasks), evaluation=EvaluationResult(list(results)), gains=gains or {}, **fields
    )


# Two tasks and a held-out one, with figures that are easy to add up.
BEFORE = step_metrics(
    UNTRAINED,
    [task_result("a", 10.0, WFR=100.0), task_result("b", 20.0), task_result("h", 5.0, "held_out", OOS=50.0, WR=0.0)],
    gains={"a": 0.0, "b": 0.5, "h": -0.25},
)
FIRST = step_metrics(
    0,
    [task_result("a", 80.0, WFR=10.0), task_result("h", 30.0, "held_out", OOS=20.0, WR=40.0)],
    tasks=["a"],
    gains={"a": 0.5, "h": 0.125},
    training={"loss": 2.0, "seconds": 12.0},
)
SECOND = step_metrics(
    1,
    [
        task_result("a", 50.0, WFR=20.0),
        task_result("b", 90.0),
        task_result("h", 40.0, "held_out", OOS=0.0, WR=20.0),
    ],
    tasks=["b"],
    replayed=("a",),
    gains={"a": 0.25, "b": 0.75, "h": 0.375},
    training={"loss": 1.0, "seconds": 30.5},
)
HISTORY = [BEFORE, FIRST, SECOND]


def sample_history(
    strategy: str, *, seen: Sequence[str] = SEEN, held_out: Sequence[str] = HELD_OUT, keep: float = 0.5
) -> list[StepMetrics]:
    """The untrained model and a step a task (all in one for ``joint``); what is learnt fades to ``keep`` per step."""
    groups = [list(seen)] if strategy == "joint" else [[name] for name in seen]
    history = [_measure(UNTRAINED, strategy, [], [], dict.fromkeys(seen, 0), held_out, 0)]
    for step, new in enumerate(groups):
        learnt = [name for group in groups[: step + 1] for name in group]
        replayed = [] if strategy in ("sft", "joint") else learnt[:step][-2:]
        ages = {name: 0 if name in new + replayed else step - learnt.index(name) for name in learnt}
        history.append(_measure(step, strategy, new, replayed, ages, held_out, keep))
    return history


def write_run(run: Path, history: Sequence[StepMetrics]) -> Path:
    """Write what a run with that history leaves behind, but for models and answers."""
    write_lines(run / CONFIG_FILE, ["model: <bundled>", f"strategy: {history[-1].strategy}"])
    write_lines(run / ENVIRONMENT_FILE, [json.dumps({"python": "3.11", "cpu": "R&D <8 cores>"}, indent=2)])
    for metrics in history:
        folder = step_folder(run, metrics.step)
        write_metrics(run, metrics)
        if metrics.step != UNTRAINED:
            drawn = [Draw(task, "row", 0) for task in metrics.replayed]
            gains = [0.125 * (n + 1) for n in range(len(drawn))]
            plan = make_plan(
                drawn, gains, step=metrics.step, seed=0, alpha=0.3, n_replay_tasks=2, n_per_task=1, model_hash="m"
            )
            write_lines(folder / PLAN_FILE, [plan.to_json().rstrip("\n")])
        mark_complete(folder)
    return run


def table_rows(table: str) -> list[list[str]]:
    """The cells of a text table, whose columns are two blanks apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


def _measure(
    step: int,
    strategy: str,
    new: Sequence[str],
    replayed: Sequence[str],
    ages: dict[str, int],
    held_out: Sequence[str],
    keep: float,
) -> StepMetrics:
    noise = random.Random("untrained" if step == UNTRAINED else f"{strategy} {step}").uniform
    best = 10 if step == UNTRAINED else 90
    results = [
        task_result(name, best * keep**age - noise(0, 8), OOS=90 - best + 10 * age) for name, age in ages.items()
    ]
    for n, name in enumerate(held_out):
        p = None if n else 20 + 35 * keep + noise(0, 8)
        results.append(task_result(name, p, "held_out", "gpt" if n else "match", WFR=50 - 45 * keep, WR=0))
    gains = {result.task: (result.p or 30) / 400 - noise(0, 0.05) for result in results}
    training = {"loss": 1 / (step + 2), "instances": 40.0 + 10 * len(replayed), "seconds": 10 + noise(0, 2)}
    return step_metrics(
        step,
        results,
        tasks=new,
        gains=gains,
        strategy=strategy,
        replayed=tuple(replayed),
        training={} if step == UNTRAINED else training,
    )
