"""Checks of single rows: what is wrong with one becomes a RowError that names the field and the fix."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from kpig_fast.data.schema import Constraints, Demonstration, FormatRule, PoolInstruction
from kpig_fast.data.validation import RowError
from kpig_fast.method.masking import KeyPart, find_spans

_NESTED = {
    "instructions": PoolInstruction,
    "constraints": Constraints,
    "format": FormatRule,
    "demonstrations": Demonstration,
}

# The similarity of two swapped letters in a word of six; ``prompt_id``, a field of its own, and ``prompt`` have 0.8.
_MISSPELLED = 0.83


def row_error(error: ValidationError, fields: Iterable[str]) -> RowError:
    """The first problem that pydantic found in a row whose valid ``fields`` are these."""
    first = error.errors(include_url=False)[0]
    loc, value = first["loc"], first["input"]
    path = _path(loc)
    if first["type"] == "missing":
        return RowError("missing field", f"{path}: is missing; add it")
    if first["type"] in ("string_too_short", "too_short") and not value:
        return RowError("empty", f"{path}: is empty; fill it in")
    if first["type"] == "extra_forbidden":
        parent = next((_NESTED[part] for part in reversed(loc[:-1]) if part in _NESTED), None)
        return _unknown_field(path, str(loc[-1]), parent.model_fields if parent else fields)
    if first["type"] == "value_error":
        problem = first["msg"].removeprefix("Value error, ")
        return RowError("key part not found", f"{path}.{problem}" if path else problem)
    if "key_parts" in loc[:-1]:
        path = _path(loc[: loc.index("key_parts") + 2])
        return RowError("schema", f"{path}: {value!r} is no key part; give a text of the instruction or [start, end]")
    return RowError("schema", f"{path}: {first['msg']}, not {_short(value)}; correct the value")


def reject_misspelled(row: Iterable[str], fields: Iterable[str]) -> list[str]:
    """The names in ``row`` that are not among ``fields``: they carry other things, such as a licence.

    Raises:
        RowError: one of them looks like a misspelling of a valid field that the row does not have.
    """
    names, valid = list(row), list(fields)
    unknown = [name for name in names if name not in valid]
    absent = [name for name in valid if name not in names]
    for name in unknown:
        if get_close_matches(name.lower(), absent, cutoff=_MISSPELLED):
            raise _unknown_field(name, name, absent)
    return unknown


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint `` (did you mean …?)`` with the nearest of the ``known`` names; empty where none is near."""
    found = get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def check_text(path: str, text: str) -> None:
    """Raises RowError where ``text`` is blank."""
    if not text.strip():
        raise RowError("empty", f"{path}: is empty; fill it in or drop the row")


def check_key_parts(text: str, key_parts: Sequence[KeyPart]) -> None:
    """Raises RowError where a key part does not occur in ``text``."""
    try:
        find_spans(text, key_parts, where="key_parts")
    except ValueError as error:
        raise RowError("key part not found", str(error)) from error


def _unknown_field(path: str, name: str, fields: Iterable[str]) -> RowError:
    closest = get_close_matches(name.lower(), list(fields), n=1, cutoff=0.0)[0]
    return RowError("schema", f"{path}: unknown field; did you mean {closest!r}?")


def _path(loc: Sequence[int | str]) -> str:
    """``("instructions", 0, "text")`` as ``instructions[0].text``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
