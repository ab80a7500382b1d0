"""The plain data that everything else speaks: instances, tasks with their instruction pools, rows, constraints."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as validated_dataclass

from kpig_fast.method.masking import MASK_TEXT, KeyPart, find_spans, mask_instruction

Metric = Literal["acc", "f1", "rougeL", "bleu", "match", "gpt"]
Role = Literal["seen", "held_out"]
Split = Literal["train", "validation", "test"]


@validated_dataclass(frozen=True)
class Instance:
    """One instruction with its context and expected output: the unit that is scored and trained.

    Args:
        instruction: the complete instruction.
        output: the expected answer.
        context: the input that the instruction is applied to; may be empty.
        key_parts: spans of the instruction, as verbatim texts or ``(start, end)`` character offsets.
        task: name of the task that the instance belongs to.
        id: any name; error messages use it.
    """

    instruction: str
    output: str
    context: str = ""
    key_parts: tuple[KeyPart, ...] = ()
    task: str = ""
    id: str = ""

    @property
    def where(self) -> str:
        """How messages name this instance."""
        return f"instance {self.id!r}" if self.id else f"an instance of task {self.task!r}" if self.task else "instance"

    def masked_instruction(self, mask_text: str = MASK_TEXT) -> str:
        """The instruction with its key parts masked. Raises ValueError where a key part does not occur."""
        return mask_instruction(self.instruction, self.key_parts, mask_text=mask_text, where=self.where)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PoolInstruction(_Strict):
    """One wording of a task's instruction, with its key parts and the strategy that produced it."""

    text: str = Field(min_length=1)
    key_parts: tuple[KeyPart, ...] = ()
    strategy: str = "original"

    @model_validator(mode="after")
    def _key_parts_occur(self) -> "PoolInstruction":
        find_spans(self.text, self.key_parts, where="key_parts")
        return self


class FormatRule(_Strict):
    """One rule that an answer's form must obey; a violation counts towards WFR.

    ==============  =====================================================================
    kind            obeyed when
    ==============  =====================================================================
    json_list       the answer parses as a JSON list
    delimiter       the items are separated by ``text`` (and by no other common delimiter)
    order           the items, split at ``text``, are sorted (``text`` default: white space)
    reverse_order   … sorted downwards
    upper, lower    every letter has that case
    capitalized     every word starts with an upper-case letter and goes on in lower case
    words           ``minimum <= number of words <= maximum``
    sentences       … of sentences
    items           … of items split at ``text``
    regex           the whole answer matches the pattern ``text``
    ==============  =====================================================================
    """

    kind: Literal[
        "json_list",
        "delimiter",
        "order",
        "reverse_order",
        "upper",
        "lower",
        "capitalized",
        "words",
        "sentences",
        "items",
        "regex",
    ]
    text: str = ""
    minimum: int = Field(default=0, ge=0)
    maximum: int | None = Field(default=None, ge=0)


class Constraints(_Strict):
    """What an answer of a task must obey, as data. A part that is absent is not checked and not averaged in.

    ``labels``: the allowed answers (OOS). ``spans_of_context``: every item must occur in the context (OOS).
    ``format``: rules of form (WFR). ``max_words``: longer answers are wordy (WR).
    """

    labels: tuple[str, ...] = ()
    spans_of_context: bool = False
    format: tuple[FormatRule, ...] = ()
    max_words: int | None = Field(default=None, ge=1)


class Demonstration(_Strict):
    """A worked example shown before a held-out question."""

    context: str
    output: str


class Change(_Strict):
    """A task's instruction with one key part changed, for the half-listening test.

    ``constraints``: what an answer must obey now. ``old``: how to tell an answer in the form of training; default the
    task's own constraints.
    """

    instruction: PoolInstruction
    constraints: Constraints
    old: Constraints | None = None


class Task(_Strict):
    """A task: its pool of instructions, the one metric it is measured by, and its constraints.

    ``changed``: the same task with one key part changed, which it is never trained on. ``changed_from`` names the seen
    task of which a held-out task changes one key part.
    """

    task: str = Field(min_length=1)
    category: str = ""
    role: Role = "seen"
    instructions: tuple[PoolInstruction, ...] = Field(min_length=1)
    metric: Metric = "rougeL"
    constraints: Constraints = Constraints()
    demonstrations: tuple[Demonstration, ...] = ()
    changed: Change | None = None
    changed_from: str | None = None


class Row(_Strict):
    """One question of a task: a context and one or more right answers; training takes the first."""

    task: str = Field(min_length=1)
    id: str = Field(min_length=1)
    context: str = ""
    outputs: tuple[str, ...] = Field(min_length=1)
    split: Split = "train"


def make_instance(task: Task, row: Row, instruction: int = 0) -> Instance:
    """The instance that asks ``row`` with the ``instruction``-th wording of the task's pool."""
    return under_wording(task.instructions[instruction], row)


def under_wording(wording: PoolInstruction, row: Row) -> Instance:
    """The instance that asks ``row`` with ``wording``."""
    return Instance(wording.text, row.outputs[0], row.context, wording.key_parts, row.task, row.id)


@dataclass(frozen=True)
class TaskCollection:
    """Tasks by name, with their rows in file order."""

    tasks: dict[str, Task] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    @classmethod
    def of(cls, tasks: Iterable[Task], rows: Iterable[Row]) -> "TaskCollection":
        """Collect tasks and rows. Raises ValueError for a task given twice or a row of an unknown task."""
        by_name: dict[str, Task] = {}
        for task in tasks:
            if task.task in by_name:
                raise ValueError(f"task {task.task!r} is given twice; task names must be unique")
            by_name[task.task] = task
        rows = tuple(rows)
        for row in rows:
            if row.task not in by_name:
                raise ValueError(f"row {row.id!r} belongs to unknown task {row.task!r}; add the task or drop the row")
        return cls(by_name, rows)

    def names(self, role: Role | None = None) -> list[str]:
        """Task names, in order; only those with ``role`` where given."""
        return [name for name, task in self.tasks.items() if role is None or task.role == role]

    def of_task(self, name: str, split: Split | None = None) -> list[Row]:
        """The rows of one task, only those of ``split`` where given."""
        return [row for row in self.rows if row.task == name and split in (None, row.split)]

    def select(self, names: Sequence[str]) -> "TaskCollection":
        """The collection with only the named tasks, in that order. Raises ValueError for an unknown name."""
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; known tasks: {', '.join(self.tasks)}")
        keep = set(names)
        return TaskCollection({name: self.tasks[name] for name in names}, tuple(r for r in self.rows if r.task in keep))

    def with_roles(self, seen: Sequence[str] | None, held_out: Sequence[str] | None) -> "TaskCollection":
        """The collection with other roles.

        Where ``seen`` is given, the named tasks alone; where only ``held_out`` is, all of them, those named held out.
        Raises ValueError for an unknown name.
        """
        roles: dict[str, Role] = {**dict.fromkeys(seen or (), "seen"), **dict.fromkeys(held_out or (), "held_out")}
        chosen = self.select(list(roles if seen is not None else {**self.tasks, **roles}))
        tasks = {
            name: task.model_copy(update={"role": roles.get(name, task.role)}) for name, task in chosen.tasks.items()
        }
        return TaskCollection(tasks, chosen.rows)
