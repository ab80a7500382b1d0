"""Random instructions for the small base model: questions of the suite's kind in words that are not the suite's."""

import random
from dataclasses import dataclass

from kpig_fast.data.schema import Demonstration
from kpig_fast.data.suite.lexicon import DIGITS, KIND_OF, NUMBER_WORDS, WORDS
from kpig_fast.data.suite.phrases import COUNTS, PLURALS, SIGNS, a, outcomes, phrases
from kpig_fast.data.suite.recipes import FIELDS, THINGS, Case, Recipe
from kpig_fast.data.suite.tasks import HELD_OUT, SEEN

SUITE_RECIPES = {design.recipe for design in (*SEEN, *HELD_OUT)}
_CASES: tuple[Case, ...] = ("as_is", "as_is", "as_is", "lower", "upper", "capitalized")
_LISTS = ("keep", "keep", "first", "first", "reverse", "odd", "sort_numbers", "sort_names", "record")
_LABELLED = ("kind", "kind", "mood", "contains", "larger", "parity", "count")
_LABEL_TEXT = (
    "A B C D E F G H K L P Q X Y Z yes no true false good bad left right up down in out on off high low north south "
    "creature dish thing item plus minus hot cold old new big small user agent fine wrong positive negative top bottom "
    "day night win loss stop go zero one two three four five six seven"
)
_LABEL_WORDS = _LABEL_TEXT.split()

_TELLING_LABELS = {
    "mood": (("positive", "negative"), ("praise", "blame")),
    "contains": (("found", "missing"), ("true", "false")),
    "larger": (("larger", "smaller"), ("high", "low")),
    "parity": (("even", "odd"),),
}

_SOURCES = {
    "list": ("a list of words", "a short list", "some words", "several words", "a row of items", "a few words"),
    "sort_numbers": ("some numbers", "a list of numbers", "a row of numbers", "a few numbers"),
    "sort_names": ("some names", "a list of names", "the names of some people", "a few first names"),
    "record": ("a record", "some facts about a person", "the record of a person", "a person with three fields"),
    "sentence": ("a sentence", "a short sentence", "one sentence", "a short text"),
    "larger": ("two numbers", "a pair of numbers"),
}
_SOURCE_OF = {"kind": "sentence", "mood": "sentence", "parity": "sentence"} | {name: name for name in _SOURCES}
_FRAMES = (
    "You get {source}. {What}. Write the answer {form}.",
    "Given {source}, {what}. Answer {form}.",
    "{What}. The input is {source}. Your answer must be {form}.",
    "The input below is {source}. Please {what}. Reply {form}.",
    "I will show you {source}. Your task is to {what}. Give the answer {form}. {filler}",
    "Read {source} and {what}. The answer has to be {form}. {filler}",
    "{filler} Here you see {source}. You should {what}. Write it {form}.",
    "Your answer must come {form}. {filler} You are given {source}. Now {what}.",
    "{What}, {form}. {filler}",
    "Somebody gives you {source}. {filler} They want you to {what}, and to write the result {form}.",
    "This is a task about {source}. First read it, then {what}. At the end, write down the result {form}.",
    "From {source}, {what}. They should be given {form}. {filler}",
)
_FILLERS = (
    "",
    "",
    "Write nothing else.",
    "Do not add anything else.",
    "Give only the answer, without any explanation.",
    "There is no full stop at the end.",
    "Think about every part of the input first.",
    "Go through the input slowly, one after another.",
    "Be careful and read all of it.",
    "Leave out all the others.",
    "Keep the old order in your reply.",
    "There may be none at all.",
    "This is a small part of a game that these people play at a party.",
    "Nobody knows who wrote this or where it came from.",
    "A teacher hands it to each of the guests and tells them to begin.",
    "The job is not hard, and you can do it together with a friend.",
    "Somebody came back with this, but they did not say what it is for.",
    "For their next trip they need to know the same things once more.",
    "Below these lines there is nothing else to be seen.",
    "It was picked at random from a large book, so think before you say anything.",
    "To do this well, add up what you know and leave nothing behind.",
    "On the other side of the street, its kinds and names are well known.",
)
_WHATS = {
    "keep": ("pick out every {kind}", "write down all the words that are {kinds}", "list the {kinds} and nothing else"),
    "first": ("write the first {count} words", "copy only the {count} words that come first"),
    "reverse": ("reverse the list", "write the list backwards", "turn the order of the words around"),
    "odd": ("find the word that does not fit", "name the word that does not belong with the others"),
    "sort_numbers up": ("put the numbers in rising order", "order the numbers so that the smallest comes first"),
    "sort_numbers down": ("put the numbers in falling order", "order the numbers so that the largest comes first"),
    "sort_names up": ("put the names in order from A to Z", "write the names in alphabetical order"),
    "sort_names down": ("put the names in order from Z to A", "write the names in reverse alphabetical order"),
    "record": ("write the {kind} and the {other}", "find first the {kind} and second the {other}"),
    "kind": (
        "say what the thing is",
        "decide whether the thing is {a_kind} or {a_other}",
        "find out the kind of thing",
    ),
    "mood": ("say what the person thinks of the thing", "decide whether the opinion is good or bad"),
    "contains": ("say whether there is {a_kind} in the list", "check the list for {kinds}"),
    "count": ("say how many {kinds} there are", "find the number of {kinds} in the list"),
    "larger": ("say which number is greater", "find out whether the first number is the larger one"),
    "parity": ("find out whether the room number is even or odd", "check the number of the room"),
}
_FIELD_WHATS = ("write only the {}", "find the {}")
_LABEL_FORMS = (
    "with {yes} for {first} and {no} for {second}",
    "with {no} for {second} and {yes} for {first}",
    "with the label {yes} for {first}, or {no} for {second}",
    "by one of two words, {yes} for {first}, {no} for {second}",
)
_DELIMITER_FORMS = ("with {sign} between the items", "joined by {sign}", "divided by {sign}", "with {sign} in between")
_CASE_FORMS = {
    "lower": ("in lower case", "without any capital letters", "all in small letters"),
    "upper": ("in upper case", "without any small letters", "all in capital letters"),
    "capitalized": ("with a capital at the start of every word", "with every first letter a capital"),
}


@dataclass(frozen=True)
class Exercise:
    """One instruction with demonstrations (none or two) and questions with their answers."""

    instruction: str
    demonstrations: tuple[Demonstration, ...]
    questions: tuple[Demonstration, ...]


def random_exercise(rng: random.Random, n_questions: int) -> Exercise:
    """An exercise on a recipe that no task of the bundled suite has; one of four shows demonstrations."""
    recipe = random_recipe(rng)
    while recipe in SUITE_RECIPES:
        recipe = random_recipe(rng)
    n_shown = 2 if rng.random() < 0.25 else 0
    contexts = [recipe.context(rng) for _ in range(n_shown + n_questions)]
    examples = tuple(Demonstration(context=c, output=recipe.answer(c)) for c in contexts)
    return Exercise(instruction_of(rng, recipe), examples[:n_shown], examples[n_shown:])


def random_recipe(rng: random.Random) -> Recipe:
    """Any recipe that can be put into words."""
    operation = rng.choice(_LISTS if rng.random() < 0.5 else _LABELLED)
    target = _random_target(rng, operation)
    if operation in _LABELLED:
        return Recipe(operation, target, labels=_random_labels(rng, operation, target))
    several = operation != "odd" and not (operation == "record" and len(target) == 1)
    return Recipe(
        operation,
        target,
        delimiter=rng.choice(sorted(SIGNS)) if several else "",
        case=rng.choice(_CASES),
        count=rng.choice(sorted(COUNTS)) if operation == "first" else 0,
    )


def _random_target(rng: random.Random, operation: str) -> tuple[str, ...]:
    if operation in ("keep", "contains", "count"):
        return (rng.choice(sorted(WORDS)),)
    if operation == "kind":
        return tuple(rng.sample(THINGS, 2))
    if operation == "record":
        return tuple(rng.sample(FIELDS, rng.choice((1, 2))))
    return (rng.choice(("up", "down")),) if operation.startswith("sort") else ()


def _random_labels(rng: random.Random, operation: str, target: tuple[str, ...]) -> tuple[str, ...]:
    if operation == "count":
        return rng.choice((DIGITS, NUMBER_WORDS))
    # Labels that mean what they stand for teach what is asked; arbitrary ones teach to read the instruction.
    if rng.random() < 0.4:
        return rng.choice(_TELLING_LABELS.get(operation, (target,)))
    words = rng.sample(_LABEL_WORDS if rng.random() < 0.7 else sorted(KIND_OF), 2)
    change = rng.choice((str, str, str.upper, str.capitalize))
    return tuple(change(word) for word in words)


def instruction_of(rng: random.Random, recipe: Recipe) -> str:
    """A random wording of ``recipe``."""
    own = phrases(recipe, concrete=rng.random() < 0.5)
    what = own.what if rng.random() < 0.4 else _what(rng, recipe)
    form = list(own.form) if rng.random() < 0.4 else _form(rng, recipe)
    rng.shuffle(form)
    source = rng.choice(_SOURCES[_SOURCE_OF.get(recipe.operation, "list")])
    text = rng.choice(_FRAMES).format(
        source=source,
        what=what,
        What=what[0].upper() + what[1:],
        form=rng.choice((", ", " and ")).join(form) or "in one line",
        filler=rng.choice(_FILLERS),
    )
    return " ".join(text.split())


def _what(rng: random.Random, recipe: Recipe) -> str:
    if recipe.operation == "record" and len(recipe.target) == 1:
        return rng.choice(_FIELD_WHATS).format(recipe.target[0])
    key = f"{recipe.operation} {recipe.target[0]}" if recipe.operation.startswith("sort") else recipe.operation
    kind, other = (*recipe.target, "", "")[:2]
    return rng.choice(_WHATS[key]).format(
        kind=kind,
        other=other,
        a_kind=a(kind) if kind else "",
        a_other=a(other) if other else "",
        kinds=PLURALS.get(kind),
        count=COUNTS.get(recipe.count),
    )


def _form(rng: random.Random, recipe: Recipe) -> list[str]:
    form = []
    if recipe.operation == "count":
        form.append(rng.choice(("as {}", "written as {}")).format("a digit" if recipe.labels == DIGITS else "a word"))
    elif recipe.labels:
        (yes, no), (first, second) = recipe.labels, outcomes(recipe)
        form.append(rng.choice(_LABEL_FORMS).format(yes=yes, no=no, first=first, second=second))
    if recipe.delimiter:
        form.append(rng.choice(_DELIMITER_FORMS).format(sign=SIGNS[recipe.delimiter]))
    if recipe.case != "as_is":
        form.append(rng.choice(_CASE_FORMS[recipe.case]))
    return form
