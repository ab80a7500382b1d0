"""Evaluation of a model on a collection of tasks: ask, keep the answers, score them."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import TypeAdapter, ValidationError

from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Row, Split, Task, TaskCollection
from kpig_fast.data.templates import Question
from kpig_fast.evaluation.metrics import Tally, mean_tally, tally
from kpig_fast.evaluation.tables import EvaluationResult, TaskResult
from kpig_fast.evaluation.violations import Violation, violations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kpig_fast.data.encoding import PromptEncoder


@dataclass(frozen=True)
class Prediction:
    """One answered question.

    Args:
        task: name of the task.
        id: id of the row.
        prompt: what the model was shown, as text.
        context: the context of the row.
        answer: what the model said.
        references: the right answers.
    """

    task: str
    id: str
    prompt: str
    context: str
    answer: str
    references: tuple[str, ...]


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    collection: TaskCollection,
    *,
    encoder: "PromptEncoder",
    tasks: Sequence[str] | None = None,
    split: Split = "test",
    limit: int | None = None,
    max_new_tokens: int = 32,
    batch_tokens: int = 8192,
    demonstrations: int = 2,
    stop_at_newline: bool = False,
    progress: bool = False,
    predictions_path: Path | None = None,
) -> EvaluationResult:
    """Ask ``model`` the questions of every task and score its answers.

    Every question is asked with the first wording of its task; held-out tasks are shown worked examples before it.

    Args:
        model: a Hugging Face causal language model, or one under PEFT.
        tokenizer: its tokenizer.
        collection: tasks and rows.
        encoder: makes the prompts.
        tasks: names of the tasks to ask; all of them by default.
        split: which rows to ask.
        limit: the most rows of a task, from its first on.
        max_new_tokens, batch_tokens, stop_at_newline, progress: as for ``generate_answers``.
        demonstrations: the most worked examples before a question of a held-out task.
        predictions_path: JSONL file for the answers; ``read_predictions`` reads it.

    Raises:
        ValueError: an unknown task, a task without rows in ``split``, or what ``generate_answers`` refuses.
    """
    asked, prompts = _questions(collection, encoder, tasks, split, limit, demonstrations)
    predictions = ask(
        model,
        tokenizer,
        asked,
        prompts,
        encoder=encoder,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        stop_at_newline=stop_at_newline,
        progress=progress,
        predictions_path=predictions_path,
    )
    return score_predictions(predictions, collection)


def ask(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    prompts: list[list[int]],
    *,
    encoder: "PromptEncoder",
    predictions_path: Path | None = None,
    **generation: Any,
) -> list[Prediction]:
    """Ask ``prompts``, one for each of ``rows``; ``generation``: further arguments of ``generate_answers``.

    The answers are also written to ``predictions_path``, where one is given.
    """
    # Scoring stored answers needs no torch.
    from kpig_fast.evaluation.generation import generate_answers

    names, ends = [row_name(row) for row in rows], () if encoder.end_id is None else (encoder.end_id,)
    answers = generate_answers(model, tokenizer, prompts, names=names, end_ids=ends, **generation)
    predictions = [
        Prediction(row.task, row.id, text, row.context, answer, row.outputs)
        for row, text, answer in zip(rows, tokenizer.batch_decode(prompts), answers, strict=True)
    ]
    if predictions_path is not None:
        write_predictions(predictions, predictions_path)
    return predictions


def check_questions(
    model: "PreTrainedModel",
    collection: TaskCollection,
    *,
    encoder: "PromptEncoder",
    tasks: Sequence[str],
    split: Split,
    limit: int | None,
    max_new_tokens: int,
    demonstrations: int,
) -> None:
    """Check that ``evaluate`` with the same arguments can ask every question, before hours are spent on training.

    Raises:
        ValueError: what ``evaluate`` would raise.
    """
    from kpig_fast.evaluation.generation import check_prompts

    asked, prompts = _questions(collection, encoder, tasks, split, limit, demonstrations)
    check_prompts(model, prompts, [row_name(row) for row in asked], max_new_tokens)


Judge = Callable[[Task, Sequence[Prediction]], list[bool]]
"""Says of answers to a task, one by one, whether they are reasonable."""


def score_predictions(
    predictions: Iterable[Prediction], collection: TaskCollection, judge: Judge | None = None
) -> EvaluationResult:
    """Score answers again without the model, by the metrics and constraints that ``collection`` has now.

    Tasks come in the order of their first answer. Tasks with metric ``gpt`` are scored by ``judge``, without one they
    are not. Raises ValueError for an answer of an unknown task.
    """
    by_task: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction.task, []).append(prediction)
    known = collection.select(list(by_task)).tasks
    return EvaluationResult([_result(task, by_task[name], judge) for name, task in known.items()])


def tallies(task: Task, predictions: Sequence[Prediction], judge: Judge | None = None) -> dict[str, Tally]:
    """The figures of the answers to ``task``, each 0–100: ``P`` where it is scored, ``V`` and the rates that apply.

    ``V`` is the mean of those rates. Without a ``judge`` tasks with metric ``gpt`` are not scored.
    """
    found: dict[str, Tally | None] = {}
    if task.metric == "gpt" and judge is not None:
        found["P"] = mean_tally([100.0 * verdict for verdict in judge(task, predictions)])
    else:
        answers, references = [one.answer for one in predictions], [one.references for one in predictions]
        found["P"] = tally(task.metric, answers, references)
    broken = [violations(task.constraints, one.answer, one.context) for one in predictions]
    if broken[0]:
        found["V"] = mean_tally([100 * sum(one.values()) / len(one) for one in broken])
    found |= {kind: mean_tally([100.0 * one[kind] for one in broken]) for kind in broken[0]}
    return {name: one for name, one in found.items() if one is not None}


def write_predictions(predictions: Iterable[Prediction], path: Path) -> None:
    """Write predictions as JSONL; the file appears whole or not at all."""
    write_lines(path, (json.dumps(asdict(prediction), ensure_ascii=False) for prediction in predictions))


def read_predictions(path: Path) -> list[Prediction]:
    """Read what ``write_predictions`` wrote. Raises ValueError naming the file and line of a broken row."""
    adapter = TypeAdapter(Prediction)
    predictions = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                predictions.append(adapter.validate_json(line))
            except ValidationError as error:
                raise ValueError(f"{path}:{number}: no prediction: {error}") from error
    return predictions


def questions(
    collection: TaskCollection,
    tasks: Sequence[str] | None = None,
    split: Split = "test",
    limit: int | None = None,
    demonstrations: int = 2,
) -> list[tuple[Row, Question]]:
    """What ``evaluate`` with the same arguments asks: the rows, and the question of each.

    Raises:
        ValueError: an unknown task, or a task without rows in ``split``.
    """
    chosen = collection if tasks is None else collection.select(tasks)
    return [
        (row, _question(task, row, demonstrations))
        for task in chosen.tasks.values()
        for row in _rows(chosen, task, split, limit)
    ]


def _questions(
    collection: TaskCollection,
    encoder: "PromptEncoder",
    tasks: Sequence[str] | None,
    split: Split,
    limit: int | None,
    demonstrations: int,
) -> tuple[list[Row], list[list[int]]]:
    """The rows to ask, and the prompt of each."""
    asked = questions(collection, tasks, split, limit, demonstrations)
    return [row for row, _ in asked], [encoder.prompt(*question) for _, question in asked]


def row_name(row: Row) -> str:
    """How errors name a row."""
    return f"row {row.id!r} of task {row.task!r}"


def _rows(collection: TaskCollection, task: Task, split: Split, limit: int | None) -> list[Row]:
    rows = collection.of_task(task.task, split)[:limit]
    if not rows:
        raise ValueError(
            f"task {task.task!r} has no rows to ask in split {split!r}; "
            "add rows, choose another split or name the tasks to ask"
        )
    return rows


def _question(task: Task, row: Row, demonstrations: int) -> Question:
    shown = task.demonstrations[:demonstrations] if task.role == "held_out" else ()
    return Question(task.instructions[0].text, row.context, shown)


def _result(task: Task, predictions: list[Prediction], judge: Judge | None) -> TaskResult:
    found = tallies(task, predictions, judge)
    p = found["P"].value if "P" in found else None
    rates: dict[Violation, float] = {kind: found[kind].value for kind in get_args(Violation) if kind in found}
    return TaskResult(task.task, task.role, task.category, task.metric, p, rates, len(predictions))
