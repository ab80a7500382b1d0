"""The questions of an evaluation as a task folder for lm-evaluation-harness (``lm_eval --include_path``).

The harness asks what ``evaluate`` asks with the plain template. Its ``p`` and ``v`` are the same P and V, because the
folder calls back into this module. Tasks whose metric needs a judge have a ``v`` only, or are left out without one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Constraints, Metric, Row, Split, Task, TaskCollection
from kpig_fast.data.templates import PlainTemplate, Question
from kpig_fast.evaluation.evaluate import questions
from kpig_fast.evaluation.metrics import score
from kpig_fast.evaluation.violations import violations

_UTILS = '''\
"""What the tasks of this folder call; the rules are those of kpig_fast."""

from pathlib import Path

from kpig_fast.evaluation.harness import p_of_task, percentage, process_results, read_questions

__all__ = ["load", "p_of_task", "percentage", "process_results"]


def load(file, **_):
    return read_questions(Path(__file__).parent / file)
'''


def write_harness_tasks(
    collection: TaskCollection,
    folder: Path,
    *,
    name: str = "kpig_suite",
    split: Split = "test",
    limit: int | None = None,
    demonstrations: int = 2,
    max_new_tokens: int = 32,
) -> list[str]:
    """Write a YAML and a JSONL file for every task, the group of all and ``utils.py``; returns the tasks' names there.

    The folder can be moved. Using it needs ``kpig_fast`` beside the harness.

    Args:
        collection: tasks and rows.
        folder: where the files go.
        name: of the group; those of the tasks are ``name`` and the task's own after an underscore.
        split, limit, demonstrations: as for ``evaluate``.
        max_new_tokens: longest answer, in tokens.

    Raises:
        ValueError: a task without rows in ``split``, or no task that can be scored without a judge.
    """
    tasks = [task for task in collection.tasks.values() if _figures(task)]
    if not tasks:
        raise ValueError("no task has constraints or a metric that works without a judge; add one")
    names = [_harness_name(name, task) for task in tasks]
    for task, harness_name in zip(tasks, names, strict=True):
        asked = questions(collection, [task.task], split, limit, demonstrations)
        write_lines(folder / f"{task.task}.jsonl", (json.dumps(_document(task, *pair)) for pair in asked))
        write_lines(folder / f"{task.task}.yaml", _yaml(_task_config(harness_name, task, max_new_tokens)))
    write_lines(folder / f"{name}.yaml", _yaml(_group_config(name, names, tasks)))
    write_lines(folder / "utils.py", _UTILS.splitlines())
    return names


def read_questions(path: Path) -> dict[str, Any]:
    """The rows of one task as the harness wants them: a ``datasets.Dataset`` under ``test``."""
    from datasets import Dataset

    return {"test": Dataset.from_list([json.loads(line) for line in path.read_text("utf-8").splitlines()])}


def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """What one answer adds to the figures of its task.

    Args:
        document: a row that ``write_harness_tasks`` wrote.
        results: the answer.

    Returns:
        ``p``: what ``p_of_task`` needs; ``v`` and each violation that the task defines: 0 to 1.
    """
    answer = results[0].strip()
    constraints = Constraints.model_validate_json(document["constraints"])
    found = violations(constraints, answer, document["context"])
    figures: dict[str, Any] = {name.lower(): float(violated) for name, violated in found.items()}
    if found:
        figures["v"] = fmean(figures.values())
    if document["metric"] != "gpt":
        figures["p"] = (document["metric"], answer, list(document["references"]))
    return figures


def p_of_task(items: Sequence[tuple[Metric, str, list[str]]]) -> float | None:
    """The performance metric of a task, 0–100, from the metric, answer and references of every row."""
    metrics, answers, references = zip(*items, strict=True)
    return score(metrics[0], answers, references)


def percentage(items: Sequence[float]) -> float:
    """The mean of shares, in percent."""
    return 100 * fmean(items)


def _figures(task: Task) -> list[str]:
    rates = [name.lower() for name in violations(task.constraints, "")]
    return [*(["p"] if task.metric != "gpt" else []), *(["v"] if rates else []), *rates]


def _document(task: Task, row: Row, question: Question) -> dict[str, Any]:
    return {
        "id": row.id,
        "prompt": PlainTemplate.text(*question),
        "context": row.context,
        "references": row.outputs,
        "metric": task.metric,
        "constraints": task.constraints.model_dump_json(),
    }


def _task_config(name: str, task: Task, max_new_tokens: int) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": _Function("utils.load"),
        "dataset_kwargs": {"file": f"{task.task}.jsonl"},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        # The harness shows it, nothing is compared with it.
        "doc_to_target": "{{references[0]}}",
        # Nothing but the end-of-sequence token ends an answer.
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
        "process_results": _Function("utils.process_results"),
        "metric_list": [
            {
                "metric": figure,
                "aggregation": _Function("utils.p_of_task" if figure == "p" else "utils.percentage"),
                "higher_is_better": figure == "p",
            }
            for figure in _figures(task)
        ],
    }


def _group_config(name: str, names: list[str], tasks: Sequence[Task]) -> dict[str, Any]:
    figures = [figure for figure in ("p", "v") if any(figure in _figures(task) for task in tasks)]
    return {
        "group": name,
        "task": names,
        # Every task counts the same, as in P-score and V-score.
        "aggregate_metric_list": [{"metric": f, "aggregation": "mean", "weight_by_size": False} for f in figures],
    }


def _harness_name(name: str, task: Task) -> str:
    if not re.fullmatch(r"[\w.+-]+", task.task):
        raise ValueError(
            f"task {task.task!r} cannot name a file and a task of the harness; use letters, digits, _ . + -"
        )
    return f"{name}_{task.task}"


class _Function(str):
    """A function that the harness is to call."""


class _Dumper(yaml.SafeDumper):
    """Writes a ``_Function`` under the harness's own tag."""


_Dumper.add_representer(_Function, lambda dumper, value: dumper.represent_scalar("!function", value))


def _yaml(value: Mapping[str, Any]) -> list[str]:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True).splitlines()
