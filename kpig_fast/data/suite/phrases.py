"""How a recipe is put into words: its key parts, short or concrete."""

from typing import NamedTuple

from kpig_fast.data.suite.lexicon import DIGITS
from kpig_fast.data.suite.recipes import Recipe


class Phrases(NamedTuple):
    """The key parts of an instruction: what to do, and which form the answer takes."""

    what: str
    form: tuple[str, ...]


COUNTS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"animal": "animals", "food": "foods", "tool": "tools", "garment": "garments", "colour": "colours"}
_DIRECTIONS = {
    "sort_numbers": {
        "up": ("from the smallest to the largest", "with the smallest number first and the largest number last"),
        "down": ("from the largest to the smallest", "with the largest number first and the smallest number last"),
    },
    "sort_names": {
        "up": ("in alphabetical order", "in alphabetical order, the names near A before the names near Z"),
        "down": ("in reverse alphabetical order", "in reverse alphabetical order, names near Z before names near A"),
    },
}
SIGNS = {
    ", ": "a comma",
    "; ": "a semicolon",
    " | ": "a vertical bar",
    " / ": "a slash",
    " - ": "a dash",
}
_OUTCOMES = {
    "mood": ("praise", "blame"),
    "contains": ("found", "missing"),
    "larger": ("larger", "smaller"),
    "parity": ("even", "odd"),
}
_FIELD_FORMS = ("the {}", "the value of {}")
_CASES = {
    "lower": ("in small letters", "in small letters only, none of them a capital"),
    "upper": ("in capital letters", "in capital letters only, none of them small"),
    "capitalized": ("with a capital first letter", "with a capital first letter and small letters after it"),
}


def phrases(recipe: Recipe, *, concrete: bool = False) -> Phrases:
    """The key parts of ``recipe``; ``concrete`` says the same more specifically."""
    pairs = [_what(recipe), *_form(recipe)]
    what, *form = (pair[concrete] for pair in pairs)
    return Phrases(what, tuple(form))


def a(noun: str) -> str:
    """``noun`` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _what(recipe: Recipe) -> tuple[str, str]:
    target = recipe.target
    match recipe.operation:
        case "keep":
            return f"keep only the {PLURALS[target[0]]}", f"keep only the words that name {a(target[0])}"
        case "first":
            count = COUNTS[recipe.count]
            return f"take the first {count} items", f"take the {count} items at the start of the list"
        case "reverse":
            return "write the items in reverse order", "write the items in reverse order, the last one first"
        case "odd":
            return "find the odd one out", "find the odd one out, the only word of another kind"
        case "sort_numbers" | "sort_names":
            items = recipe.operation.removeprefix("sort_")
            short, concrete = _DIRECTIONS[recipe.operation][target[0]]
            return f"sort the {items} {short}", f"sort the {items} {concrete}"
        case "record":
            short, concrete = (" and then ".join(form.format(field) for field in target) for form in _FIELD_FORMS)
            return f"give {short}", f"give {concrete}"
        case "kind":
            return (
                f"tell {a(target[0])} from {a(target[1])}",
                f"tell whether the thing is {a(target[0])} or {a(target[1])}",
            )
        case "mood":
            return "judge the mood", "judge whether the speaker praises or blames the thing"
        case "contains":
            return f"look for {a(target[0])}", f"look whether one of the words names {a(target[0])}"
        case "count":
            return f"count the {PLURALS[target[0]]}", f"count how many of the words name {a(target[0])}"
        case "larger":
            return "compare the numbers", "compare the first number with the second number"
        case _:
            return "look at the room number", "look whether the room number is even or odd"


def outcomes(recipe: Recipe) -> tuple[str, str]:
    """What the two labels of ``recipe`` stand for, one word each."""
    if recipe.operation == "kind":
        return recipe.target[0], recipe.target[1]
    return _OUTCOMES[recipe.operation]


def _form(recipe: Recipe) -> list[tuple[str, str]]:
    pairs = []
    if recipe.operation == "count":
        numerals = "a digit" if recipe.labels == DIGITS else "a number word"
        pairs.append((f"as {numerals}", f"as {numerals} such as {recipe.labels[3]}"))
    elif recipe.labels:
        (yes, no), (first, second) = recipe.labels, outcomes(recipe)
        pairs.append(
            (
                f"with {yes} for {first} and {no} for {second}",
                f"with the word {yes} for {first} and the word {no} for {second}",
            )
        )
        pairs.append(("in one word", "in exactly one word"))
    if recipe.delimiter:
        sign = SIGNS[recipe.delimiter]
        blanks = "a blank after it" if recipe.delimiter[0] != " " else "a blank on both sides of it"
        pairs.append((f"separated by {sign}", f"separated by {sign} with {blanks}"))
    if recipe.case != "as_is":
        pairs.append(_CASES[recipe.case])
    return pairs
