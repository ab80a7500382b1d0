"""The tasks of the bundled suite: what each one asks, and its instructions in five wordings."""

from dataclasses import dataclass, replace
from typing import Any

from kpig_fast.data.schema import Metric, PoolInstruction
from kpig_fast.data.suite.lexicon import DIGITS, NUMBER_WORDS
from kpig_fast.data.suite.phrases import phrases
from kpig_fast.data.suite.recipes import Recipe


@dataclass(frozen=True)
class Design:
    """A task before its rows are drawn.

    Args:
        name: the task's name.
        category: the group that streams by category use.
        metric: how answers are scored.
        recipe: what is asked.
        source: what the input is, as instructions call it.
        original: the first wording, with the slots ``{what}`` and ``{form}``.
        changed_from: name of the seen task of which this held-out task changes one key part.
    """

    name: str
    category: str
    metric: Metric
    recipe: Recipe
    source: str
    original: str
    changed_from: str | None = None

    def wordings(self) -> tuple[PoolInstruction, ...]:
        """The pool of instructions: the original and one wording per way of rewriting it."""
        frames = {"original": self.original, **_REWRITTEN}
        return tuple(self._wording(strategy, frame) for strategy, frame in frames.items())

    def _wording(self, strategy: str, frame: str) -> PoolInstruction:
        what, form = phrases(self.recipe, concrete=strategy == "concretizing")
        added = _ADDED.get(strategy)
        text = frame.format(source=self.source, what=what, form=", ".join(form), added=added)
        return PoolInstruction(text=text, key_parts=(what, *form, *([added] if added else ())), strategy=strategy)


_REWRITTEN = {
    "concretizing": "Look at {source}. Your job is to {what}. The answer has to be given {form}.",
    "reasoning": "Below you find {source}. {added}, and then {what}. Write down only the result, {form}.",
    "constraint": "You see {source}. Please {what}. The answer must come {form}, {added}.",
    "breadth": "Somebody hands you {source} and wants you to {what}. Reply {form}. Add nothing else to your reply.",
}
_ADDED = {
    "reasoning": "Go through the input slowly and think about every part of it first",
    "constraint": "without any explanation and without a full stop at the end",
}

SEEN = (
    Design(
        "keep_animals",
        "selection",
        "match",
        Recipe("keep", ("animal",), " | ", "lower"),
        "a list of four words",
        "You are given some words of several kinds. From these words, {what}. Write them {form}, in their old order.",
    ),
    Design(
        "keep_colours",
        "selection",
        "match",
        Recipe("keep", ("colour",), ", ", "upper"),
        "a list of four words",
        "In this task you read four words with commas between them. You should {what}. Give the answer {form}.",
    ),
    Design(
        "first_two",
        "selection",
        "rougeL",
        Recipe("first", delimiter=" / ", count=2),
        "a list of words",
        "The input is a short list. Please {what} and leave out all the others. Your answer must be {form}.",
    ),
    Design(
        "odd_one_out",
        "selection",
        "acc",
        Recipe("odd", case="capitalized"),
        "three words, two of them of the same kind",
        "Two of these three words belong together and one does not. Now {what}. Write this word {form}.",
    ),
    Design(
        "sort_numbers",
        "ordering",
        "acc",
        Recipe("sort_numbers", ("up",), ", "),
        "a few numbers",
        "You will be shown some numbers in a random order. Your task is to {what}. They should be {form}.",
    ),
    Design(
        "sort_names",
        "ordering",
        "acc",
        Recipe("sort_names", ("up",), "; "),
        "the first names of some people",
        "These are the names of guests at a party. For the guest list, {what}. The list has to be {form}.",
    ),
    Design(
        "reverse_words",
        "ordering",
        "rougeL",
        Recipe("reverse", delimiter=" - "),
        "a list of words",
        "Read the list from its end back to its start, that is, {what}. The items of the answer are {form}.",
    ),
    Design(
        "animal_or_food",
        "labelling",
        "acc",
        Recipe("kind", ("animal", "food"), labels=("A", "B")),
        "a sentence about a thing",
        "The sentence tells where somebody came across a thing. Your task is to {what}. Answer {form}.",
    ),
    Design(
        "mood",
        "labelling",
        "acc",
        Recipe("mood", labels=("good", "bad")),
        "a sentence in which somebody gives an opinion",
        "In the sentence below, somebody says what they think of a thing. Please {what}. Answer {form}.",
    ),
    Design(
        "contains_tool",
        "labelling",
        "acc",
        Recipe("contains", ("tool",), labels=("Yes", "No")),
        "a list of three words",
        "Read the three words of the list one after another and {what}. Give your answer {form}.",
    ),
    Design(
        "room_number",
        "labelling",
        "acc",
        Recipe("parity", labels=("left", "right")),
        "a sentence about a room",
        "The sentence says who has which room. To find its side of the corridor, {what}. Answer {form}.",
    ),
    Design(
        "count_animals",
        "comparison",
        "acc",
        Recipe("count", ("animal",), labels=DIGITS),
        "a list of three words",
        "Look at the three words in the list and {what}. There may be none at all. Write the number {form}.",
    ),
    Design(
        "compare_numbers",
        "comparison",
        "acc",
        Recipe("larger", labels=("true", "false")),
        "two numbers",
        "You want to know whether the first of the two numbers is larger or smaller. To do so, {what}. Answer {form}.",
    ),
    Design(
        "name_and_age",
        "extraction",
        "acc",
        Recipe("record", ("name", "age"), " - "),
        "the record of a person",
        "The record of a person has three fields in any order. From this record, {what}. Write them {form}.",
    ),
    Design(
        "city_and_name",
        "extraction",
        "rougeL",
        Recipe("record", ("city", "name"), " / ", "upper"),
        "the record of a person",
        "You get three facts about a person, each with its name. Out of these facts, {what}. The answer is {form}.",
    ),
)


def _held_out(name: str, changed_from: str, **change: Any) -> Design:
    seen = next(design for design in SEEN if design.name == changed_from)
    return replace(seen, name=name, changed_from=changed_from, recipe=replace(seen.recipe, **change))


HELD_OUT = (
    _held_out("keep_animals_semicolon", "keep_animals", delimiter="; "),
    _held_out("keep_colours_capitalized", "keep_colours", case="capitalized"),
    _held_out("first_three", "first_two", count=3),
    _held_out("sort_numbers_down", "sort_numbers", target=("down",)),
    _held_out("animal_or_food_words", "animal_or_food", labels=("creature", "dish")),
    _held_out("contains_tool_lower", "contains_tool", labels=("yes", "no")),
    _held_out("count_animals_words", "count_animals", labels=NUMBER_WORDS),
    _held_out("age_and_name", "name_and_age", target=("age", "name")),
)
