"""Task files of Natural Instructions (Wang et al., arXiv 2204.07705), with key parts from side files."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator
from tqdm import tqdm

from kpig_fast.data.checks import nearest, reject_misspelled, row_error
from kpig_fast.data.collection import collect, parse_task
from kpig_fast.data.files import read_object, read_rows
from kpig_fast.data.schema import Constraints, FormatRule, Metric, Role, Task, TaskCollection
from kpig_fast.data.validation import RowError, ValidationReport

_ROLES: dict[str, Role] = {"seen": "seen", "stream": "seen", "held_out": "held_out", "heldout": "held_out"}
_DEMONSTRATIONS = 2

Paths = str | Path | Sequence[str | Path]

# Older task files have a text where newer ones have a list of them.
_Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class _Example(BaseModel):
    input: str
    output: _Texts = Field(min_length=1)


class _TaskFile(BaseModel):
    definitions: _Texts = Field(alias="Definition", min_length=1)
    categories: _Texts = Field(default=[], alias="Categories")
    examples: list[_Example] = Field(default=[], alias="Positive Examples")
    instances: list[dict[str, Any]] = Field(alias="Instances")


class _Changed(BaseModel):
    """One key part of the instruction changed: other labels, or a rule of form that had not been there."""

    text: str
    key_parts: list[Any] | None = None
    key_part_spans: list[Any] | None = None
    label_map: dict[str, str] | None = None
    rule: str | None = Field(default=None, pattern=r"^(upper|lower|quote|(prefix|suffix):.+)$")

    @model_validator(mode="after")
    def _says_what_changed(self) -> "_Changed":
        if (self.label_map is None) == (self.rule is None):
            raise ValueError("give either label_map or rule")
        return self


class _Side(BaseModel):
    """What the side files say about one task."""

    task: str
    role: Literal["seen", "stream", "held_out", "heldout"] = "seen"
    kind: str = ""
    labels: list[str] = []
    metric: Metric | None = None
    constraints: Constraints | None = None
    instructions: list[dict[str, Any]] = []
    key_parts: list[Any] | None = None
    key_part_spans: list[Any] | None = None
    changed_constraint: _Changed | None = None
    _where: str = PrivateAttr("")


def load_natural_instructions(
    folder: str | Path,
    *,
    side_file: Paths | None = None,
    tasks: Sequence[str] | None = None,
    n_test: int = 100,
    n_validation: int = 0,
    seen: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    strict: bool = False,
    progress: bool = False,
) -> tuple[TaskCollection, ValidationReport]:
    """Read task files in the official JSON form, ``<folder>/<task>.json``.

    The first definition is the first wording of the pool, the first two positive examples are the demonstrations. What
    is dropped into the report is what :func:`load_collection` drops, and tasks whose file is broken.

    Args:
        folder: holds the task files.
        side_file: one or more JSON lists or JSON Lines files whose rows have ``task`` and any of: ``key_parts`` or
            ``key_part_spans`` of the definition; ``instructions``, a pool of wordings with theirs; ``role``; ``kind``
            (``label``: metric ``acc``, and ``labels`` are the only answers allowed); ``metric``; ``constraints``;
            ``changed_constraint``, for the half-listening test: ``text`` with its key parts, and either ``label_map``
            from old labels to new ones or a new ``rule`` of form (``upper``, ``lower``, ``quote``, ``prefix:…``,
            ``suffix:…``).
            Later files add to and override earlier ones.
        tasks: the tasks to read, in this order; default those of ``seen`` and ``held_out``, without them all: first
            those of the side files in their order, then the others by name.
        n_test: the first ``n_test`` instances of a file are test rows.
        n_validation: as many after them are validation rows, and the others training rows.
        seen: tasks with this role; it goes before the role in the side files. Default role is seen.
        held_out: likewise.
        strict: raise where anything would be dropped.
        progress: show a bar over the task files.

    Raises:
        FileNotFoundError: no task file in ``folder``, or an absent side file.
        ValueError: a task that has no file, or both roles.
        DataError: a broken side file; with ``strict``, any problem.
    """
    report = ValidationReport()
    side = _read_side(side_file, report)
    roles = _roles(seen or (), held_out or ())
    files = _task_files(Path(folder), [*(tasks or ()), *roles])
    place = {name: n for n, name in enumerate(side)}
    names = tasks or list(roles) or sorted(files, key=lambda name: (place.get(name, len(place)), name))
    loaded: dict[str, Task] = {}
    rows: list[tuple[str, dict[str, Any]]] = []
    for name in tqdm(names, desc="reading tasks", unit="task", disable=not progress):
        where = str(files[name])
        try:
            file = _read_task_file(files[name])
            told = side.get(name, _Side(task=name))
            fields = _task_fields(file, told)
            if name in roles:
                fields["role"] = roles[name]
            loaded[name] = parse_task(fields, told._where or where, report)
            rows += _rows(name, file, where, n_test, n_validation)
        except RowError as error:
            report.add(where, error)
    collection = collect(loaded, rows, report)
    report.require_clean(strict)
    return collection, report


def _read_side(side_file: Paths | None, report: ValidationReport) -> dict[str, _Side]:
    paths = [side_file] if isinstance(side_file, str | Path) else side_file or []
    side: dict[str, _Side] = {}
    for path in paths:
        for where, fields in read_rows(Path(path), report):
            try:
                row = _parse_side(fields)
            except RowError as error:
                report.add(where, error)
            else:
                given = {name: getattr(row, name) for name in row.model_fields_set}
                side[row.task] = side.get(row.task, row).model_copy(update=given)
                side[row.task]._where = where
    # Without its side row a task would have no key parts and a gain of 0: no run should begin like that.
    report.require_clean()
    return side


def _parse_side(fields: dict[str, Any]) -> _Side:
    reject_misspelled(fields, _Side.model_fields)
    try:
        return _Side.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise row_error(error, _Side.model_fields) from error


def _read_task_file(path: Path) -> _TaskFile:
    try:
        return _TaskFile.model_validate(read_object(path))
    except ValidationError as error:
        raise row_error(error, _TaskFile.model_fields) from error


def _roles(seen: Sequence[str], held_out: Sequence[str]) -> dict[str, str]:
    both = sorted({*seen} & {*held_out})
    if both:
        raise ValueError(f"task {both[0]!r} is named both in seen and in held_out; keep one")
    return {**dict.fromkeys(seen, "seen"), **dict.fromkeys(held_out, "held_out")}


def _task_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    files = {path.stem: path for path in folder.glob("*.json")}
    if not files:
        raise FileNotFoundError(f"no task file (*.json) in {folder}; give the folder that holds the task files")
    for name in names:
        if name not in files:
            raise ValueError(f"no file {name}.json in {folder}{nearest(name, files)}")
    return files


def _task_fields(file: _TaskFile, side: _Side) -> dict[str, Any]:
    labelled = side.kind == "label"
    return {
        "task": side.task,
        "category": next(iter(file.categories), ""),
        "role": _ROLES[side.role],
        "instructions": _pool(file.definitions[0], side),
        "metric": side.metric or ("acc" if labelled else "rougeL"),
        "constraints": side.constraints or Constraints(labels=tuple(side.labels) if labelled else ()),
        "changed": side.changed_constraint and _change(side.changed_constraint),
        "demonstrations": [{"context": e.input, "output": e.output[0]} for e in file.examples[:_DEMONSTRATIONS]],
    }


def _change(changed: _Changed) -> dict[str, Any]:
    """A task's change. Where it adds a rule of form, every answer that breaks the rule has the old form."""
    if changed.label_map is not None:
        asked = Constraints(labels=tuple(dict.fromkeys(changed.label_map.values())))
        old = Constraints(labels=tuple(changed.label_map))
    else:
        asked, old = (Constraints(format=(rule,)) for rule in _form(str(changed.rule)))
    return {"instruction": _wording(changed.text, changed), "constraints": asked, "old": old}


def _form(rule: str) -> tuple[FormatRule, FormatRule]:
    """A rule of form, and the rule that everything else obeys."""
    kind, _, text = rule.partition(":")
    given = re.escape(text)
    pattern = {
        "upper": r"[^a-z]*",
        "lower": r"[^A-Z]*",
        "quote": r'".+"',
        "prefix": rf"{given}.+",
        "suffix": rf".+{given}",
    }[kind]
    obeyed = FormatRule(kind=kind) if kind in ("upper", "lower") else FormatRule(kind="regex", text=f"(?s:{pattern})")
    return obeyed, FormatRule(kind="regex", text=f"(?s:(?!{pattern}$).*)")


def _wording(text: str, marked: _Side | _Changed) -> dict[str, Any]:
    marks = {"key_parts": marked.key_parts, "key_part_spans": marked.key_part_spans}
    return {"text": text, **{name: value for name, value in marks.items() if value is not None}}


def _pool(definition: str, side: _Side) -> list[dict[str, Any]]:
    """The wordings, the definition first: with its key parts from the pool where it is there, else from its row."""
    alone = _wording(definition, side)
    original = next((wording for wording in side.instructions if wording.get("text") == definition), alone)
    return [original, *(wording for wording in side.instructions if wording is not original)]


def _rows(
    name: str, file: _TaskFile, where: str, n_test: int, n_validation: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    ours = {"id": "id", "input": "context", "output": "output"}
    for n, instance in enumerate(file.instances):
        fields = {ours[field]: value for field, value in instance.items() if field in ours}
        split = "test" if n < n_test else "validation" if n < n_test + n_validation else "train"
        yield f"{where}: Instances[{n}]", {"id": f"{name}-{n}", **fields, "task": name, "split": split}
