"""The bundled suite: small text tasks whose instructions carry real constraints, generated without any download.

Every held-out task is a seen task with exactly one key part changed: another delimiter, case, order, length or set of
labels. A model that half-listens answers it the way that the seen task was answered.
"""

import random
from itertools import islice, zip_longest

from kpig_fast.data.schema import Change, Demonstration, Row, Split, Task, TaskCollection
from kpig_fast.data.suite.tasks import HELD_OUT, SEEN, Design

N_DEMONSTRATIONS = 2
_MAX_DRAWS = 100


def bundled_suite(*, seed: int = 0, n_train: int = 200, n_validation: int = 20, n_test: int = 50) -> TaskCollection:
    """The seen and held-out tasks with their rows; the same arguments give the same rows.

    Args:
        seed: of the contexts.
        n_train: training rows of every seen task; held-out tasks have none.
        n_validation: validation rows of every task.
        n_test: test rows of every task.

    No context occurs twice in one task, not even in two splits or as a demonstration. Where a task has labels, its
    validation and test rows have them in turns: of the first rows, too, one answer to all of them gets chance.

    Raises:
        ValueError: a task does not have that many different contexts.
    """
    tasks, rows = [], []
    for design in (*SEEN, *HELD_OUT):
        held_out = design.changed_from is not None
        sizes: dict[Split, int] = {"train": 0 if held_out else n_train, "validation": n_validation, "test": n_test}
        n_shown = N_DEMONSTRATIONS if held_out else 0
        contexts = _contexts(design, n_shown + sum(sizes.values()), seed)
        shown = tuple(Demonstration(context=c, output=design.recipe.answer(c)) for c in contexts[:n_shown])
        tasks.append(_task(design, shown))
        rows += _rows(design, contexts[n_shown:], sizes)
    return TaskCollection.of(tasks, rows)


def _contexts(design: Design, count: int, seed: int) -> list[str]:
    """``count`` different contexts."""
    rng = random.Random(f"{seed}/{design.name}")
    contexts: dict[str, None] = {}
    for _ in range(_MAX_DRAWS * count):
        contexts[design.recipe.context(rng)] = None
        if len(contexts) == count:
            break
    else:
        if count:
            raise ValueError(
                f"task {design.name!r} has fewer than {count} different contexts (found {len(contexts)}); "
                "ask for fewer rows per task"
            )
    return list(contexts)


def _task(design: Design, demonstrations: tuple[Demonstration, ...]) -> Task:
    changed = next((one for one in HELD_OUT if one.changed_from == design.name), None)
    return Task(
        task=design.name,
        category=design.category,
        role="held_out" if design.changed_from else "seen",
        instructions=design.wordings(),
        metric=design.metric,
        constraints=design.recipe.constraints(),
        demonstrations=demonstrations,
        changed=changed and Change(instruction=changed.wordings()[0], constraints=changed.recipe.constraints()),
        changed_from=design.changed_from,
    )


def _rows(design: Design, contexts: list[str], sizes: dict[Split, int]) -> list[Row]:
    drawn, rows = iter(contexts), list[Row]()
    for split, size in sizes.items():
        answered = [(context, design.recipe.answer(context)) for context in islice(drawn, size)]
        if split != "train":
            answered = _in_turns(answered, design.recipe.labels)
        for index, (context, answer) in enumerate(answered):
            name = f"{design.name}-{split}-{index}"
            rows.append(Row(task=design.name, id=name, context=context, outputs=(answer,), split=split))
    return rows


def _in_turns(answered: list[tuple[str, str]], labels: tuple[str, ...]) -> list[tuple[str, str]]:
    """Contexts with their answers, those of each label in turns as long as there are some."""
    if not labels:
        return answered
    turns = zip_longest(*([one for one in answered if one[1] == label] for label in labels))
    return [one for turn in turns for one in turn if one]
