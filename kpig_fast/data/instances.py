"""Instances from rows in the forms that people have: ours, Alpaca, prompt and completion, messages."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from kpig_fast.data.checks import check_key_parts, check_text, reject_misspelled, row_error
from kpig_fast.data.files import read_rows
from kpig_fast.data.schema import Instance
from kpig_fast.data.validation import RowError, ValidationReport

_FIELDS = ("instruction", "output", "context", "key_parts", "task", "id")
_RENAMED = {"prompt": "instruction", "completion": "output", "input": "context"}
_FORMS = "instruction and output (with context or input), prompt and completion, or messages; key_parts with each"


def as_instance(row: Instance | Mapping[str, Any]) -> Instance:
    """One row as an Instance; null counts as absent, further fields, such as a licence, are not used.

    Accepted are ``instruction, output, context, key_parts, task, id``, with Alpaca's ``input`` for ``context``;
    ``prompt, completion``; and ``messages``, a list of role and content. The last message is the assistant's and
    becomes the output; those before it, joined by blank lines in their order, become the instruction.

    Raises:
        ValueError: another form, a misspelled field or a value of the wrong type.
    """
    return _read(row)[0]


def read_instances(
    source: str | Path | Iterable[Instance | Mapping[str, Any]], *, strict: bool = False, progress: bool = False
) -> tuple[list[Instance], ValidationReport]:
    """Read instances from a JSON Lines file (also ``.gz``), a list of rows, or one split of a ``datasets`` object.

    Rows that are broken, empty, given twice, or whose key parts do not occur are dropped into the report.

    Raises:
        DataError: ``strict``, and a row was dropped.
        ValueError: ``source`` maps names to splits.
    """
    if isinstance(source, Mapping):
        raise ValueError(f"a mapping of {', '.join(map(repr, source))} is given; pass one of its values")
    report = ValidationReport()
    rows: Iterable[tuple[str, Any]]
    if isinstance(source, str | Path):
        rows = read_rows(Path(source), report)
    else:
        rows = ((f"row {n}", row) for n, row in enumerate(source))
    instances: list[Instance] = []
    first: dict[tuple, str] = {}
    for where, row in tqdm(rows, desc="reading", unit="row", disable=not progress):
        try:
            instance, unused = _read(row)
            _check(instance, first, where)
        except RowError as error:
            report.drop(where, error)
        else:
            instances.append(instance)
            report.unused.update(unused)
    report.kept = len(instances)
    report.require_clean(strict)
    return instances, report


def _check(instance: Instance, first: dict[tuple, str], where: str) -> None:
    check_text("instruction", instance.instruction)
    check_text("output", instance.output)
    check_key_parts(instance.instruction, instance.key_parts)
    content = (instance.instruction, instance.output, instance.context, instance.key_parts, instance.task)
    if content in first:
        raise RowError("duplicate", f"row: repeats {first[content]}; keep one of them")
    first[content] = where


def _read(row: Any) -> tuple[Instance, list[str]]:
    """The instance of a row, and the names of the fields that were not used."""
    if isinstance(row, Instance):
        return row, []
    if not isinstance(row, Mapping):
        raise RowError("schema", f"row: is a {type(row).__name__}; give a mapping with {_FORMS}")
    given = {name: value for name, value in row.items() if value is not None}
    unused = reject_misspelled(given, [*_FIELDS, *_RENAMED, "messages"])
    fields, used = _fields(given)
    if "id" in fields:
        fields["id"] = str(fields["id"])
    try:
        return Instance(**fields), sorted({*unused, *given} - used)
    except ValidationError as error:
        raise row_error(error, _FIELDS) from error


def _fields(given: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The fields of the instance in a row, and the names that they have there."""
    common = {name: given[name] for name in ("key_parts", "task", "id") if name in given}
    for question, answer in (("instruction", "output"), ("prompt", "completion")):
        if question in given and answer in given:
            contexts = [name for name in ("context", "input") if name in given]
            if len(contexts) > 1:
                raise RowError("schema", "input: is given beside context; keep one of them")
            texts = {name: given[name] for name in (question, answer, *contexts)}
            renamed = {_RENAMED.get(name, name): value for name, value in texts.items()}
            return {**renamed, **common}, {*texts, *common}
    if "messages" in given:
        instruction, output = _split(given["messages"])
        return {"instruction": instruction, "output": output, **common}, {"messages", *common}
    found = ", ".join(given) or "none"
    raise RowError("missing field", f"row: fields found: {found}; give {_FORMS}")


def _split(messages: Any) -> tuple[str, str]:
    """Instruction and output of a conversation."""
    try:
        turns = [(message["role"], message["content"]) for message in messages]
    except (TypeError, KeyError) as error:
        raise RowError("schema", "messages: is no list of role and content; write it as one") from error
    if not turns or turns[-1][0] != "assistant":
        last = f"ends with {turns[-1][0]!r}" if turns else "is empty"
        raise RowError("schema", f"messages: {last}; end it with the assistant's answer")
    contents = [content for _, content in turns]
    if not all(isinstance(content, str) for content in contents):
        raise RowError("schema", "messages: a content is no text; write every content as one text")
    return "\n\n".join(contents[:-1]), contents[-1]
