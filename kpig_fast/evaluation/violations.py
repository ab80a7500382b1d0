"""The violations behind the V-score, checked by rules and exactly (He et al., ACL 2025).

``WFR``: wrong format. ``OOS``: out of the allowed scope. ``WR``: wordy. Letter case, quotes and every blank inside the
answer count; white space around it does not, nor does how Unicode composes an accented letter.

The items of an answer are the elements of a JSON list where the answer is one, otherwise the pieces between the
separator ``text`` of the rule. Scope is checked item by item where a rule of form makes the answer a list.
"""

import json
import re
import unicodedata
from typing import Any, Literal

from kpig_fast.data.schema import Constraints, FormatRule

Violation = Literal["WFR", "OOS", "WR"]

_LISTING = ("json_list", "delimiter", "order", "reverse_order", "items")
_DELIMITERS = (",", ";", "|", "/", "\n", "\t", " - ", " & ", " + ", " : ", " > ", "->", "=>")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?:\s+(?![a-z])|$)|[。！？]+")


def violations(constraints: Constraints, answer: str, context: str = "") -> dict[Violation, bool]:
    """Which of the defined constraints ``answer`` violates; a kind that is not defined has no entry.

    An empty answer has the wrong format, lies out of scope and is not wordy.

    Args:
        constraints: what answers of the task must obey.
        answer: what the model said.
        context: the context of the question, for ``spans_of_context``.
    """
    answer, context = _composed(answer.strip()), _composed(context)
    found: dict[Violation, bool] = {}
    if constraints.format:
        found["WFR"] = not answer or not all(_obeys(rule, answer) for rule in constraints.format)
    if constraints.labels or constraints.spans_of_context:
        found["OOS"] = not answer or not _in_scope(constraints, answer, context)
    if constraints.max_words is not None:
        found["WR"] = len(answer.split()) > constraints.max_words
    return found


def _in_scope(constraints: Constraints, answer: str, context: str) -> bool:
    listing = next((rule for rule in constraints.format if rule.kind in _LISTING), None)
    parts = [answer] if listing is None else _items(answer, listing.text)
    labels = set(map(_composed, constraints.labels))
    if labels and answer not in labels and not set(parts) <= labels:
        return False
    return not constraints.spans_of_context or all(part in context for part in parts)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _obeys(rule: FormatRule, answer: str) -> bool:
    match rule.kind:
        case "json_list":
            return _json_list(answer) is not None
        case "delimiter":
            return _separated(answer, rule.text)
        case "order":
            return _sorted(_items(answer, rule.text))
        case "reverse_order":
            return _sorted(_items(answer, rule.text)[::-1])
        case "upper":
            return not any(letter.islower() for letter in answer)
        case "lower":
            return not any(letter.isupper() for letter in answer)
        case "capitalized":
            return all(_capitalized(word) for word in answer.split())
        case "words":
            return _within(rule, len(answer.split()))
        case "sentences":
            return _within(rule, sum(bool(re.search(r"\w", piece)) for piece in _SENTENCE_END.split(answer)))
        case "items":
            return _within(rule, len(_items(answer, rule.text)))
        case "regex":
            return re.fullmatch(rule.text, answer) is not None


def _within(rule: FormatRule, count: int) -> bool:
    return rule.minimum <= count and (rule.maximum is None or count <= rule.maximum)


def _split(answer: str, separator: str) -> list[str]:
    return answer.split(separator) if separator else answer.split()


def _separated(answer: str, separator: str) -> bool:
    pieces = _split(answer, separator)
    exact = all(piece and piece == piece.strip() for piece in pieces)
    return exact and not any(other in piece for piece in pieces for other in _DELIMITERS)


def _items(answer: str, separator: str) -> list[str]:
    elements = _json_list(answer)
    if elements is None:
        return [piece.strip() for piece in _split(answer, separator)]
    return [element if isinstance(element, str) else json.dumps(element) for element in elements]


def _json_list(answer: str) -> list[Any] | None:
    try:
        value = json.loads(answer, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _no_json(name: str) -> None:
    # Python's reader takes NaN and Infinity, which JSON does not have.
    raise ValueError(name)


def _sorted(values: list[str]) -> bool:
    """Sorted upwards: as numbers where all are numbers, otherwise as texts regardless of case."""
    try:
        keys = [float(value) for value in values]
    except ValueError:
        keys = [value.casefold() for value in values]
    return keys == sorted(keys)


def _capitalized(word: str) -> bool:
    letters = [letter for letter in word if letter.isalpha()]
    return not letters or (not letters[0].islower() and not any(letter.isupper() for letter in letters[1:]))
