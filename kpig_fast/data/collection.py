"""Task collections as a folder of two files, ``tasks.jsonl`` and ``instances.jsonl``."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from kpig_fast.data.checks import check_text, nearest, row_error
from kpig_fast.data.files import as_object, read_rows, write_lines
from kpig_fast.data.schema import PoolInstruction, Row, Task, TaskCollection
from kpig_fast.data.validation import RowError, ValidationReport


def load_collection(
    path: str | Path, *, strict: bool = False, progress: bool = False
) -> tuple[TaskCollection, ValidationReport]:
    """Read the collection in a folder with ``tasks.jsonl`` and ``instances.jsonl``, each plain or ``.gz``.

    Dropped into the report are tasks and rows that are broken, wordings whose key parts do not occur, rows of unknown
    tasks, empty and repeated rows, and training rows that are validation or test rows too.

    Raises:
        FileNotFoundError: a file is absent.
        DataError: ``strict``, and something was dropped.
    """
    report = ValidationReport()
    tasks: dict[str, Task] = {}
    for where, fields in read_rows(_find(Path(path), "tasks.jsonl"), report):
        try:
            task = parse_task(fields, where, report)
            if task.task in tasks:
                raise RowError("duplicate", f"task: {task.task!r} is given twice; keep one of them")
        except RowError as error:
            report.add(where, error)
        else:
            tasks[task.task] = task
    rows = read_rows(_find(Path(path), "instances.jsonl"), report)
    collection = collect(tasks, tqdm(rows, desc="reading", unit="row", disable=not progress), report)
    report.require_clean(strict)
    return collection, report


def save_collection(collection: TaskCollection, folder: str | Path) -> None:
    """Write a collection so that ``load_collection`` reads it back. Each file appears whole or not at all."""
    for name, items in (("tasks.jsonl", collection.tasks.values()), ("instances.jsonl", collection.rows)):
        write_lines(Path(folder) / name, (item.model_dump_json(exclude_defaults=True) for item in items))


def parse_task(fields: Mapping[str, Any], where: str, report: ValidationReport) -> Task:
    """A task from its fields; broken wordings of its pool go to ``report`` and the others remain.

    Raises:
        RowError: the task is broken, or none of its wordings is left.
    """
    wordings = fields.get("instructions")
    if isinstance(wordings, list):
        fields = {**fields, "instructions": list(_good_wordings(wordings, where, report))}
    changed = fields.get("changed")
    if isinstance(changed, Mapping) and isinstance(changed.get("instruction"), dict):
        fields = {**fields, "changed": {**changed, "instruction": _with_offsets(changed["instruction"])}}
    try:
        return Task.model_validate(fields)
    except ValidationError as error:
        raise row_error(error, Task.model_fields) from error


def collect(
    tasks: dict[str, Task], rows: Iterable[tuple[str, Mapping[str, Any]]], report: ValidationReport
) -> TaskCollection:
    """The collection of ``tasks`` with the good ones of ``rows``, given as place and fields; the others are dropped."""
    parsed: list[tuple[str, Row]] = []
    for where, fields in rows:
        try:
            parsed.append((where, _parse_row(fields, tasks)))
        except RowError as error:
            report.drop(where, error)
    evaluated = {(row.task, *_content(row)): where for where, row in parsed if row.split != "train"}
    first: dict[tuple[str, ...], str] = {}
    kept: list[Row] = []
    for where, row in parsed:
        try:
            _check_once(row, where, first, evaluated)
        except RowError as error:
            report.drop(where, error)
        else:
            kept.append(row)
    report.kept = len(kept)
    return TaskCollection.of(tasks.values(), kept)


def _good_wordings(wordings: list, where: str, report: ValidationReport) -> Iterator[PoolInstruction]:
    for n, wording in enumerate(wordings):
        place = f"{where}: instructions[{n}]"
        try:
            good = PoolInstruction.model_validate(_with_offsets(as_object(wording)))
            check_text("text", good.text)
            yield good
        except ValidationError as error:
            report.add(place, row_error(error, PoolInstruction.model_fields))
        except RowError as error:
            report.add(place, error)


def _with_offsets(wording: dict[str, Any]) -> dict[str, Any]:
    """A wording whose ``key_part_spans``, where it has them, have become its key parts."""
    if "key_part_spans" not in wording:
        return wording
    fields = dict(wording)
    spans, texts = fields.pop("key_part_spans"), fields.pop("key_parts", None)
    try:
        cut = [fields["text"][start:end] for start, end in spans]
    except (KeyError, TypeError, ValueError) as error:
        raise RowError("schema", "key_part_spans: are no [start, end] offsets into text; correct them") from error
    if texts is not None and cut != list(texts):
        raise RowError("key part not found", f"key_part_spans: cut out {cut}, not {texts}; correct or drop one")
    return {**fields, "key_parts": spans}


def _parse_row(fields: Mapping[str, Any], tasks: Mapping[str, Task]) -> Row:
    fields = dict(fields)
    if "outputs" not in fields and "output" in fields:
        fields["outputs"] = fields.pop("output")
    if isinstance(fields.get("outputs"), str):
        fields["outputs"] = [fields["outputs"]]
    try:
        row = Row.model_validate(fields)
    except ValidationError as error:
        raise row_error(error, Row.model_fields) from error
    if row.task not in tasks:
        close = nearest(row.task, tasks)
        raise RowError("schema", f"task: no good task is called {row.task!r}{close}; add the task or drop the row")
    for n, output in enumerate(row.outputs):
        check_text(f"outputs[{n}]", output)
    return row


def _content(row: Row) -> tuple[str, str]:
    return row.context.strip(), row.outputs[0].strip()


def _check_once(
    row: Row, where: str, first: dict[tuple[str, ...], str], evaluated: Mapping[tuple[str, ...], str]
) -> None:
    """Notes the row in ``first``. Raises RowError for an id or content that came before, or a leaked test row."""
    by_id = ("id", row.task, row.id)
    by_content = ("content", row.task, row.split, *_content(row))
    if by_id in first:
        raise RowError("duplicate", f"id: {row.id!r} is that of {first[by_id]}; give each row of a task its own")
    if by_content in first:
        raise RowError("duplicate", f"row: repeats {first[by_content]}; keep one of them")
    leaked = evaluated.get((row.task, *_content(row)))
    if row.split == "train" and leaked:
        raise RowError("leaked test row", f"split: the row is also in evaluation, {leaked}; keep it out of training")
    first[by_id] = first[by_content] = where


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds neither {name} nor {name}.gz; give the folder of a task collection")
