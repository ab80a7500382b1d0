"""What a task of the suite asks, as data: how to draw a context, the right answer to it, the rules of an answer."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kpig_fast.data.schema import Constraints, FormatRule
from kpig_fast.data.suite.lexicon import BLAME, CITIES, KIND_OF, NAMES, NUMBERS, PRAISE, WORDS

Case = Literal["as_is", "lower", "upper", "capitalized"]
FIELDS = ("name", "age", "city")
_FIELD_PATTERNS = {"name": "[A-Za-z]+", "age": "[0-9]+", "city": "[A-Za-z]+"}
THINGS = ("animal", "food", "tool", "garment")


@dataclass(frozen=True)
class Recipe:
    """One question about a context, with the form that its answer must have.

    Args:
        operation: a name in ``OPERATIONS``.
        target: what the operation is about: word classes, a direction, or record fields.
        delimiter: what stands between the items of a list answer; empty for one-word answers.
        case: letter case of a list answer.
        labels: the allowed answers, in the order of the operation's outcomes.
        count: how many items the operation takes.
    """

    operation: str
    target: tuple[str, ...] = ()
    delimiter: str = ""
    case: Case = "as_is"
    labels: tuple[str, ...] = ()
    count: int = 0

    def context(self, rng: random.Random) -> str:
        """A random input to ask about."""
        return OPERATIONS[self.operation].draw(self, rng)

    def answer(self, context: str) -> str:
        """The right answer to ``context``."""
        items = OPERATIONS[self.operation].solve(self, context)
        return self.delimiter.join(_CASES[self.case](item) for item in items)

    def constraints(self) -> Constraints:
        """The rules that every right answer obeys."""
        if self.labels:
            return Constraints(labels=self.labels, max_words=1)
        rules = []
        if self.delimiter:
            rules.append(FormatRule(kind="delimiter", text=self.delimiter))
        if self.case != "as_is":
            rules.append(FormatRule(kind=self.case))
        if self.operation in ("sort_numbers", "sort_names"):
            rules.append(FormatRule(kind="order" if self.target == ("up",) else "reverse_order", text=self.delimiter))
        if self.count:
            rules.append(FormatRule(kind="items", text=self.delimiter, minimum=self.count, maximum=self.count))
        if self.operation == "record":
            pattern = self.delimiter.join(_FIELD_PATTERNS[name] for name in self.target)
            rules.append(FormatRule(kind="regex", text=pattern))
        return Constraints(
            format=tuple(rules), spans_of_context=self.case == "as_is", max_words=12 if self.delimiter else 1
        )


@dataclass(frozen=True)
class Operation:
    """``draw(recipe, rng) -> context`` and ``solve(recipe, context) -> items of the answer``."""

    draw: Callable[[Recipe, random.Random], str]
    solve: Callable[[Recipe, str], Sequence[str]]


_CASES: dict[Case, Callable[[str], str]] = {
    "as_is": str,
    "lower": str.lower,
    "upper": str.upper,
    "capitalized": str.capitalize,
}


def _items(context: str) -> list[str]:
    return context.split(", ")


def _label(outcome: Callable[[Recipe, str], int]) -> Callable[[Recipe, str], Sequence[str]]:
    return lambda recipe, context: (recipe.labels[outcome(recipe, context)],)


def _draw_from(pool: Sequence[str], length: int, between: str = ", ") -> Callable[[Recipe, random.Random], str]:
    return lambda recipe, rng: between.join(rng.sample(pool, length))


def _draw_mixed(fewest: int, most: int, total: int) -> Callable[[Recipe, random.Random], str]:
    """Lists of ``total`` words of which ``fewest`` to ``most`` belong to the target class."""

    def draw(recipe: Recipe, rng: random.Random) -> str:
        wanted = rng.randint(fewest, most)
        others = [word for word, kind in KIND_OF.items() if kind != recipe.target[0]]
        words = rng.sample(WORDS[recipe.target[0]], wanted) + rng.sample(others, total - wanted)
        return ", ".join(rng.sample(words, total))

    return draw


def _of_target(recipe: Recipe, context: str) -> list[str]:
    return [word for word in _items(context) if KIND_OF[word] == recipe.target[0]]


def _draw_odd(recipe: Recipe, rng: random.Random) -> str:
    common, odd = rng.sample(sorted(WORDS), 2)
    return ", ".join(rng.sample([*rng.sample(WORDS[common], 2), rng.choice(WORDS[odd])], 3))


def _odd(recipe: Recipe, context: str) -> list[str]:
    kinds = [KIND_OF[word] for word in _items(context)]
    return [word for word in _items(context) if kinds.count(KIND_OF[word]) == 1]


def _sorted(recipe: Recipe, context: str) -> list[str]:
    return sorted(_items(context), reverse=recipe.target == ("down",))


def _draw_record(recipe: Recipe, rng: random.Random) -> str:
    values = dict(zip(FIELDS, map(rng.choice, (NAMES, NUMBERS, CITIES))))
    return ", ".join(f"{name}: {values[name]}" for name in rng.sample(FIELDS, len(FIELDS)))


def _record(recipe: Recipe, context: str) -> list[str]:
    values = dict(field.split(": ") for field in _items(context))
    return [values[name] for name in recipe.target]


def _draw_thing(recipe: Recipe, rng: random.Random) -> str:
    thing = rng.choice(WORDS[rng.choice(recipe.target)])
    return f"{rng.choice(NAMES)} {rng.choice(('saw', 'bought', 'found'))} the {thing} in {rng.choice(CITIES)}."


def _thing(recipe: Recipe, context: str) -> int:
    return recipe.target.index(KIND_OF[context.split()[3]])


def _draw_mood(recipe: Recipe, rng: random.Random) -> str:
    thing = rng.choice(WORDS[rng.choice(THINGS)])
    return f"{rng.choice(NAMES)} said that the {thing} was {rng.choice(rng.choice((PRAISE, BLAME)))}."


def _smaller(recipe: Recipe, context: str) -> int:
    first, second = context.split(" and ")
    return int(first < second)


def _draw_room(recipe: Recipe, rng: random.Random) -> str:
    return f"Room {rng.choice(NUMBERS)} in {rng.choice(CITIES)} belongs to {rng.choice(NAMES)}."


_ALL_WORDS = sorted(KIND_OF)

OPERATIONS = {
    "keep": Operation(_draw_mixed(2, 3, 4), _of_target),
    "first": Operation(_draw_from(_ALL_WORDS, 4), lambda recipe, context: _items(context)[: recipe.count]),
    "reverse": Operation(_draw_from(_ALL_WORDS, 3), lambda recipe, context: _items(context)[::-1]),
    "odd": Operation(_draw_odd, _odd),
    "sort_numbers": Operation(_draw_from(NUMBERS, 3), _sorted),
    "sort_names": Operation(_draw_from(NAMES, 3), _sorted),
    "record": Operation(_draw_record, _record),
    "kind": Operation(_draw_thing, _label(_thing)),
    "mood": Operation(_draw_mood, _label(lambda recipe, context: int(context.split()[-1].rstrip(".") in BLAME))),
    "contains": Operation(_draw_mixed(0, 1, 3), _label(lambda recipe, context: int(not _of_target(recipe, context)))),
    "count": Operation(_draw_mixed(0, 3, 3), _label(lambda recipe, context: len(_of_target(recipe, context)))),
    "larger": Operation(_draw_from(NUMBERS, 2, " and "), _label(_smaller)),
    "parity": Operation(_draw_room, _label(lambda recipe, context: int(context.split()[1]) % 2)),
}
