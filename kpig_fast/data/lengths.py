"""Rows that are too long for a model, by their token counts."""

from collections.abc import Sequence
from dataclasses import replace

from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import Instance, PoolInstruction, TaskCollection, under_wording
from kpig_fast.data.validation import RowError, ValidationReport


def check_lengths(
    instances: Sequence[Instance],
    encoder: PromptEncoder,
    max_length: int,
    report: ValidationReport,
    *,
    strict: bool = False,
    progress: bool = False,
) -> list[Instance]:
    """The instances whose longer prompt plus response has at most ``max_length`` tokens; the others go to ``report``.

    Raises:
        DataError: ``strict`` and the report has problems.
    """
    fits = _fits(instances, encoder, max_length, report, progress)
    report.require_clean(strict)
    return [instance for instance, fit in zip(instances, fits, strict=True) if fit]


def check_collection_lengths(
    collection: TaskCollection,
    encoder: PromptEncoder,
    max_length: int,
    report: ValidationReport,
    *,
    strict: bool = False,
    progress: bool = False,
) -> TaskCollection:
    """The collection without the rows that pass ``max_length`` tokens under the longest wording of their task.

    A changed wording, for the half-listening test, is one of them.

    Raises:
        DataError: ``strict`` and the report has problems.
    """
    longest = {name: _longest_wording(collection, name, encoder) for name in collection.tasks}
    instances = [under_wording(longest[row.task], row) for row in collection.rows]
    fits = _fits(instances, encoder, max_length, report, progress)
    report.require_clean(strict)
    return replace(collection, rows=tuple(row for row, fit in zip(collection.rows, fits, strict=True) if fit))


def _longest_wording(collection: TaskCollection, name: str, encoder: PromptEncoder) -> PoolInstruction:
    task = collection.tasks[name]
    wordings = [*task.instructions, *([task.changed.instruction] if task.changed else [])]
    lengths = _lengths([Instance(w.text, "", key_parts=w.key_parts) for w in wordings], encoder, progress=False)
    return wordings[lengths.index(max(lengths))]


def _fits(
    instances: Sequence[Instance], encoder: PromptEncoder, max_length: int, report: ValidationReport, progress: bool
) -> list[bool]:
    lengths = _lengths(instances, encoder, progress)
    for instance, length in zip(instances, lengths, strict=True):
        if length > max_length:
            text = f"prompt and response: {length} tokens; shorten the row or raise the limit of {max_length}"
            report.drop(instance.where, RowError("too long", text))
    report.kept = sum(length <= max_length for length in lengths)
    return [length <= max_length for length in lengths]


def _lengths(instances: Sequence[Instance], encoder: PromptEncoder, progress: bool) -> list[int]:
    pairs = encoder.encode_all(instances, progress=progress)
    return [max(len(p.complete_ids), len(p.masked_ids)) + len(p.response_ids) for p in pairs]
