"""The half-listening test: asked for a new form, does a model still answer in the old one (He et al., ACL 2025)?

The rows of a seen task are asked under a wording that changes one key part (``Task.changed``), without demonstrations,
which would give the form away. Only rows whose old right answer breaks the new rules are asked: a list of one item
does not show its delimiter. An answer that obeys the new rules counts as ``asked``, else one that obeys those of
training as ``old``, else as ``neither``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from kpig_fast.data.schema import Constraints, Row, Split, TaskCollection
from kpig_fast.data.templates import Question
from kpig_fast.evaluation.evaluate import Prediction, ask, row_name
from kpig_fast.evaluation.violations import violations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kpig_fast.data.encoding import PromptEncoder


@dataclass(frozen=True)
class Obedience:
    """What the answers to a task under its changed wording obey: three shares in percent, of ``n`` answers.

    Args:
        task: the seen task; empty for a mean over tasks.
        asked: the new rules.
        old: those of training, and not the new ones.
        neither: none of both.
        n: number of answers.
    """

    task: str
    asked: float
    old: float
    neither: float
    n: int


def half_listening(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    collection: TaskCollection,
    *,
    encoder: "PromptEncoder",
    tasks: Sequence[str],
    split: Split = "test",
    limit: int | None = None,
    max_new_tokens: int = 32,
    batch_tokens: int = 8192,
    stop_at_newline: bool = False,
    progress: bool = False,
    predictions_path: Path | None = None,
) -> list[Obedience]:
    """Ask ``tasks`` under their changed wordings; one result for each that has one, in their order.

    Args:
        model, tokenizer, collection, encoder, split, max_new_tokens, batch_tokens, stop_at_newline, progress: as for
            ``evaluate``.
        tasks: names of seen tasks; those without a changed wording are passed over.
        limit: the most rows of a task, of those that show the change.
        predictions_path: JSONL file for the answers; ``score_obedience`` of what ``read_predictions`` reads from it
            repeats the result.

    Raises:
        ValueError: an unknown task, or what ``generate_answers`` refuses.
    """
    rows, prompts = _questions(collection, encoder, tasks, split, limit)
    if not rows:
        return []
    predictions = ask(
        model,
        tokenizer,
        rows,
        prompts,
        encoder=encoder,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        stop_at_newline=stop_at_newline,
        progress=progress,
        predictions_path=predictions_path,
    )
    return score_obedience(predictions, collection)


def check_changed_questions(
    model: "PreTrainedModel",
    collection: TaskCollection,
    *,
    encoder: "PromptEncoder",
    tasks: Sequence[str],
    split: Split,
    limit: int | None,
    max_new_tokens: int,
) -> None:
    """Check that ``half_listening`` with the same arguments can ask every question; ValueError where it cannot."""
    from kpig_fast.evaluation.generation import check_prompts

    rows, prompts = _questions(collection, encoder, tasks, split, limit)
    check_prompts(model, prompts, [f"the changed wording of {row_name(row)}" for row in rows], max_new_tokens)


def score_obedience(predictions: Iterable[Prediction], collection: TaskCollection) -> list[Obedience]:
    """The shares of stored answers, by the rules that ``collection`` has now; tasks in the order of their answers.

    Raises:
        ValueError: an answer of a task that is unknown or has no changed wording.
    """
    by_task: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction.task, []).append(prediction)
    results = []
    for name, task in collection.select(list(by_task)).tasks.items():
        if task.changed is None:
            raise ValueError(f"task {name!r} has no changed wording, but answers to one; add `changed` to the task")
        found = by_task[name]
        answers, contexts = [one.answer for one in found], [one.context for one in found]
        old = task.changed.old or task.constraints
        results.append(Obedience(name, **obedience(answers, task.changed.constraints, old, contexts), n=len(found)))
    return results


def mean_obedience(results: Sequence[Obedience]) -> Obedience | None:
    """The shares as means over tasks, ``n`` as their sum; None without any."""
    if not results:
        return None
    shares = {name: fmean(getattr(one, name) for one in results) for name in ("asked", "old", "neither")}
    return Obedience("", **shares, n=sum(one.n for one in results))


def obedience(
    answers: Sequence[str], asked: Constraints, old: Constraints, contexts: Sequence[str] | None = None
) -> dict[str, float]:
    """Shares of the answers, in percent, that obey what was ``asked``, else the ``old`` constraints, else ``neither``.

    An answer obeys constraints when it violates none of them.

    Args:
        answers: what the model said when asked under the changed instruction.
        asked: the constraints of the changed instruction.
        old: the constraints that the model was trained on.
        contexts: the context of every answer, for scopes that are spans of the context.

    Raises:
        ValueError: no answers, a number of contexts that differs from theirs, or constraints that check nothing.
    """
    if not answers or (contexts is not None and len(contexts) != len(answers)):
        raise ValueError(f"{len(answers)} answers and {len(contexts or ())} contexts; need answers, a context for each")
    for name, constraints in (("asked", asked), ("old", old)):
        if not violations(constraints, ""):
            raise ValueError(
                f"the {name} constraints check nothing; give labels, a format, spans_of_context or max_words"
            )
    counts = {"asked": 0, "old": 0, "neither": 0}
    for answer, context in zip(answers, contexts or [""] * len(answers), strict=True):
        if _obeys(asked, answer, context):
            counts["asked"] += 1
        elif _obeys(old, answer, context):
            counts["old"] += 1
        else:
            counts["neither"] += 1
    return {name: 100 * count / len(answers) for name, count in counts.items()}


def changed_questions(
    collection: TaskCollection, tasks: Sequence[str], split: Split = "test", limit: int | None = None
) -> list[tuple[Row, Question]]:
    """What ``half_listening`` with the same arguments asks: the rows, and the question of each.

    Raises:
        ValueError: an unknown task.
    """
    found = []
    for name, task in collection.select(tasks).tasks.items():
        if task.changed is not None:
            asked, wording = task.changed.constraints, task.changed.instruction.text
            showing = [row for row in collection.of_task(name, split) if not _obeys(asked, row.outputs[0], row.context)]
            found += [(row, Question(wording, row.context)) for row in showing[:limit]]
    return found


def _questions(
    collection: TaskCollection, encoder: "PromptEncoder", tasks: Sequence[str], split: Split, limit: int | None
) -> tuple[list[Row], list[list[int]]]:
    """The rows to ask, and the prompt of each."""
    asked = changed_questions(collection, tasks, split, limit)
    return [row for row, _ in asked], [encoder.prompt(*question) for _, question in asked]


def _obeys(constraints: Constraints, answer: str, context: str) -> bool:
    return not any(violations(constraints, answer, context).values())
