"""Run folders with answers, written by hand: three tasks whose right answer is always yes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kpig_fast.data.schema import Change, Constraints, PoolInstruction, Row, Task, TaskCollection
from kpig_fast.evaluation.evaluate import Prediction, score_predictions, write_predictions
from kpig_fast.evaluation.half_listening import score_obedience
from kpig_fast.evaluation.rescoring import StoredRun
from kpig_fast.evaluation.runs import (
    HALF_LISTENING_FILE,
    PREDICTIONS_FILE,
    StepMetrics,
    mark_complete,
    step_folder,
    write_metrics,
)

# Right; wrong; wrong, out of scope and wordy; the changed wording's right answer.
SAID = {"y": "yes", "n": "no", "x": "may be", "Y": "YES"}
LABELS = Constraints(labels=("yes", "no"))
LOUD = Change(instruction=PoolInstruction(text="YES or NO?"), constraints=Constraints(labels=("YES", "NO")))
# Task a is learnt in step 0, b in step 1; h is held out.
FIRST = {"a": "yyyy", "h": "yynn"}
LAST = {"a": "yynx", "b": "yyyy", "h": "yyyn"}


def collection(**changes) -> TaskCollection:
    """The tasks with four test rows each; ``changes`` are fields of task ``a``."""
    tasks = [
        make_task("a", category="short", constraints=LABELS, changed=LOUD, **changes),
        make_task("b", category="short", constraints=Constraints(max_words=1)),
        make_task("h", category="short", constraints=LABELS, role="held_out"),
    ]
    rows = [
        Row(task=t.task, id=f"{t.task}{n}", context=str(n), outputs=("yes",), split="test")
        for t in tasks
        for n in range(4)
    ]
    return TaskCollection.of(tasks, rows)


def make_task(name: str, **fields) -> Task:
    instructions = (PoolInstruction(text="Yes or no?"),)
    return Task(**{"task": name, "instructions": instructions, "metric": "acc", **fields})


def predictions(answers: Mapping[str, str], ids: str = "") -> list[Prediction]:
    """``answers``: a task to a letter of ``SAID`` for each of its rows; ``ids`` stands before their numbers."""
    return [
        Prediction(task, f"{ids or task}{n}", "prompt", str(n), SAID[letter], ("yes",))
        for task, letters in answers.items()
        for n, letter in enumerate(letters)
    ]


def write_answered(
    folder: Path,
    steps: Sequence[Mapping[str, str]] = (FIRST, LAST),
    *,
    strategy: str = "kpig",
    loud: str = "",
    ids: str = "",
) -> Path:
    """Write a run whose steps gave these answers; ``loud``: those of task ``a`` under its changed wording."""
    for number, answers in enumerate(steps):
        told = predictions(answers, ids)
        obedience = score_obedience(predictions({"a": loud}), collection()) if loud else ()
        metrics = StepMetrics(
            number,
            strategy,
            ("a", "b")[number : number + 1],
            (),
            score_predictions(told, collection()),
            dict.fromkeys(answers, 0.25 * (number + 1)),
            obedience=tuple(obedience),
        )
        write_metrics(folder, metrics)
        write_predictions(told, step_folder(folder, number) / PREDICTIONS_FILE)
        if loud:
            write_predictions(predictions({"a": loud}), step_folder(folder, number) / HALF_LISTENING_FILE)
        mark_complete(step_folder(folder, number))
    return folder


def answered(folder: Path, *args, seed: int = 0, strategy: str = "kpig", settings=None, **more) -> StoredRun:
    """``write_answered`` as a run that can be compared; ``settings`` are further ones."""
    run = write_answered(folder, *args, strategy=strategy, **more)
    chosen = {"strategy": strategy, "seed": seed, "output_dir": str(folder), **(settings or {})}
    return StoredRun(folder.name, run, chosen, collection())
