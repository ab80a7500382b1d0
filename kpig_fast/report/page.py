"""The report page: what it shows of every run, and its HTML."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

try:
    from jinja2 import Environment, StrictUndefined
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("reports need jinja2; install it with: pip install 'kpig-fast[train]'") from error

from kpig_fast import __version__
from kpig_fast.evaluation.runs import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    PLAN_FILE,
    StepMetrics,
    split_untrained,
    step_folder,
    summarise,
)
from kpig_fast.evaluation.violations import Violation
from kpig_fast.method.replay import ReplayPlan
from kpig_fast.report.plots import Plot
from kpig_fast.report.tables import comparison_cells, format_figure
from kpig_fast.report.template import PAGE


@dataclass(frozen=True)
class RunSection:
    """What the page says of one run; tables are rows of texts, the header first.

    Args:
        name: name of the run.
        strategy: how it was trained.
        n_steps: complete steps.
        heat_map: P of every task after every step.
        tasks: figures of every task after the last step.
        not_scored: tasks whose metric needs a judge.
        steps: what every step learnt, replayed and cost; empty before the first one.
        config, environment: the texts of these files; empty where the run has none.
    """

    name: str
    strategy: str
    n_steps: int
    heat_map: Plot
    tasks: list[list[str]]
    not_scored: list[str]
    steps: list[list[str]]
    config: str
    environment: str


def make_section(name: str, run: Path, history: Sequence[StepMetrics], heat_map: Plot) -> RunSection:
    """Collect what the page says of the run in folder ``run``, whose metrics are ``history``."""
    summary = summarise(history)
    return RunSection(
        name=name,
        strategy=summary.strategy,
        n_steps=summary.steps,
        heat_map=heat_map,
        tasks=_task_cells(history),
        not_scored=history[-1].evaluation.not_scored,
        steps=_step_cells(run, history),
        config=_text(run / CONFIG_FILE),
        environment=_text(run / ENVIRONMENT_FILE),
    )


def render_page(
    histories: Mapping[str, Sequence[StepMetrics]], sections: Sequence[RunSection], curves: Sequence[Plot]
) -> str:
    """The page as HTML; every text from the runs is escaped, every image is part of the page.

    Args:
        histories: metrics of every run, by name.
        sections: one for every run.
        curves: plots of all runs together.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    return environment.from_string(PAGE).render(
        title=f"Report on {', '.join(histories)}",
        version=__version__,
        comparison=comparison_cells(histories),
        different_tasks=len({frozenset(history[-1].evaluated) for history in histories.values()}) > 1,
        curves=curves,
        runs=sections,
    )


def _task_cells(history: Sequence[StepMetrics]) -> list[list[str]]:
    lost = summarise(history).forgetting
    learnt_at = {task: step.step + 1 for step in history for task in step.tasks}
    rates = get_args(Violation)
    cells = [["task", "role", "P", "V", *rates, "gain", "forgetting", "learnt at step", "answers", "metric"]]
    for task in history[-1].evaluation.tasks:
        percents = [task.p, task.v, *(task.rates.get(rate) for rate in rates)]
        cells.append(
            [
                task.task,
                task.role.replace("_", "-"),
                *(format_figure(value, "z.1f") for value in percents),
                format_figure(history[-1].gains.get(task.task), "z.3f"),
                format_figure(lost.get(task.task), "z.1f"),
                format_figure(learnt_at.get(task.task), "d"),
                str(task.n),
                task.metric,
            ]
        )
    return cells


def _step_cells(run: Path, history: Sequence[StepMetrics]) -> list[list[str]]:
    _, trained = split_untrained(history)
    cells = [["step", "learnt", "replayed (mean gain before the step)", "instances", "loss", "seconds"]]
    for step in trained:
        figures = [("instances", ".0f"), ("loss", ".3f"), ("seconds", ".1f")]
        cells.append(
            [
                str(step.step + 1),
                ", ".join(step.tasks),
                _replayed(run, step),
                *(format_figure(step.training.get(name), spec) for name, spec in figures),
            ]
        )
    return cells if trained else []


def _replayed(run: Path, step: StepMetrics) -> str:
    plan = _text(step_folder(run, step.step) / PLAN_FILE)
    gains = ReplayPlan.from_json(plan).mean_gains if plan else {}
    named = [f"{task} ({gains[task]:z.3f})" if task in gains else task for task in step.replayed]
    return ", ".join(named) or "–"


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def _data_uri(plot: Plot) -> str:
    return f"data:image/png;base64,{b64encode(plot.png).decode()}"
