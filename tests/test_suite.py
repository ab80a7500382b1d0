"""The bundled suite: sizes, determinism, disjoint splits, key parts, answers that obey their constraints."""

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from kpig_fast.data.schema import Row, Task, TaskCollection
from kpig_fast.data.suite import bundled_suite
from kpig_fast.data.suite.lexicon import DIGITS, KIND_OF, NAMES, NUMBER_WORDS
from kpig_fast.data.suite.phrases import phrases
from kpig_fast.data.suite.recipes import OPERATIONS, Recipe
from kpig_fast.data.suite.tasks import HELD_OUT, SEEN
from kpig_fast.evaluation.violations import violations
from kpig_fast.method.masking import find_spans, mask_instruction

SUITE = bundled_suite()
EVERY = pytest.mark.parametrize("name", SUITE.names())
EVERY_HELD_OUT = pytest.mark.parametrize("name", SUITE.names("held_out"))


def _broken(task: Task, answer: str, context: str) -> bool:
    return any(violations(task.constraints, answer, context).values())


def _dump(suite: TaskCollection) -> str:
    return "\n".join(item.model_dump_json() for item in (*suite.tasks.values(), *suite.rows))


def _pair(name: str) -> tuple[Task, Task]:
    held_out = SUITE.tasks[name]
    assert held_out.changed_from is not None
    return SUITE.tasks[held_out.changed_from], held_out


def test_it_is_large_enough():
    assert len(SUITE.names("seen")) >= 12
    assert len(SUITE.names("held_out")) >= 6
    seen = [SUITE.tasks[name] for name in SUITE.names("seen")]
    assert len({task.category for task in seen}) >= 4
    assert min(Counter(task.category for task in seen).values()) >= 2
    assert len({task.metric for task in seen}) >= 3


def test_it_holds_every_kind_of_constraint():
    kinds = {rule.kind for task in SUITE.tasks.values() for rule in task.constraints.format}
    assert kinds >= {"delimiter", "order", "reverse_order", "upper", "lower", "capitalized", "items", "regex"}
    assert any(task.constraints.labels for task in SUITE.tasks.values())
    assert any(task.constraints.spans_of_context for task in SUITE.tasks.values())
    assert all(task.constraints.max_words for task in SUITE.tasks.values())


@EVERY
def test_rows_per_split(name):
    suite = bundled_suite(n_train=7, n_validation=3, n_test=5)
    held_out = suite.tasks[name].role == "held_out"
    assert [len(suite.of_task(name, split)) for split in ("train", "validation", "test")] == [7 * (not held_out), 3, 5]
    assert len(suite.tasks[name].demonstrations) == 2 * held_out


@pytest.mark.parametrize("name", [name for name, task in SUITE.tasks.items() if task.constraints.labels])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_one_answer_to_all_gets_chance(name, split):
    labels = SUITE.tasks[name].constraints.labels
    answers = [row.outputs[0] for row in SUITE.of_task(name, split)]
    turns = min(answers.count(label) for label in labels)
    assert turns > 1
    assert answers[: turns * len(labels)] == [*labels] * turns


def test_ids_are_unique_and_empty_splits_are_allowed():
    assert len({row.id for row in SUITE.rows}) == len(SUITE.rows)
    assert bundled_suite(n_train=0, n_validation=0, n_test=0).rows == ()


def test_more_rows_than_contexts_are_refused():
    # Two of thirty numbers, in order: 870 contexts.
    assert bundled_suite(n_train=800, n_validation=0, n_test=0).of_task("compare_numbers", "train")
    with pytest.raises(ValueError, match=r"'compare_numbers' has fewer than 900 .* \(found 870\); ask for fewer"):
        bundled_suite(n_train=900, n_validation=0, n_test=0)


def test_the_seed_decides_everything():
    assert _dump(bundled_suite(seed=3, n_train=9)) == _dump(bundled_suite(seed=3, n_train=9))
    a, b = (bundled_suite(seed=seed, n_train=9) for seed in (3, 4))
    for name in a.tasks:
        assert [row.context for row in a.of_task(name)] != [row.context for row in b.of_task(name)]
        assert a.tasks[name].instructions == b.tasks[name].instructions


def test_another_process_makes_the_same_bytes():
    program = "from kpig_fast.data.suite import *; s = bundled_suite(); print([*s.tasks.values(), *s.rows])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len({hashlib.sha256(output).hexdigest() for output in outputs}) == 1
    assert outputs == {f"{[*SUITE.tasks.values(), *SUITE.rows]}\n".encode()}


@EVERY
@pytest.mark.parametrize("seed", [0, 5])
def test_no_context_occurs_twice(name, seed):
    suite = SUITE if seed == 0 else bundled_suite(seed=seed)
    contexts = [row.context for row in suite.of_task(name)]
    contexts += [example.context for example in suite.tasks[name].demonstrations]
    assert len(set(contexts)) == len(contexts)


@EVERY
def test_wordings(name):
    task = SUITE.tasks[name]
    strategies = [wording.strategy for wording in task.instructions]
    assert strategies == ["original", "concretizing", "reasoning", "constraint", "breadth"]
    assert len({wording.text for wording in task.instructions}) == len(strategies)
    for wording in task.instructions:
        assert 20 <= len(wording.text.split()) <= 50
        assert "{" not in wording.text
        assert wording.text[0].isupper()
        assert wording.text.endswith(".")


@EVERY
def test_key_parts_are_found_where_they_are_meant(name):
    for wording in SUITE.tasks[name].instructions:
        spans = find_spans(wording.text, wording.key_parts)
        assert 2 <= len(spans) <= 5
        assert len(spans) == len(wording.key_parts)
        assert {wording.text[start:end] for start, end in spans} == set(wording.key_parts)
        # Inside a longer word the text would have been found by accident.
        for start, end in spans:
            assert not wording.text[start - 1 : start].isalpha()
            assert not wording.text[end : end + 1].isalpha()


@EVERY
def test_rewritten_wordings_keep_or_add_key_parts(name):
    original, concrete, reasoning, constraint, breadth = SUITE.tasks[name].instructions
    assert breadth.key_parts == original.key_parts
    for more in (reasoning, constraint):
        assert set(more.key_parts) > set(original.key_parts)
    assert all(len(new) > len(old) for new, old in zip(concrete.key_parts, original.key_parts, strict=True))


@EVERY
def test_right_answers_obey_the_constraints(name):
    task = SUITE.tasks[name]
    assert violations(task.constraints, "", "")
    for row in SUITE.of_task(name):
        assert not _broken(task, row.outputs[0], row.context), row
    for example in task.demonstrations:
        assert not _broken(task, example.output, example.context), example


@EVERY
def test_wrong_forms_break_the_constraints(name):
    task = SUITE.tasks[name]
    for row in SUITE.of_task(name, "test"):
        assert _broken(task, "", row.context)
        assert _broken(task, f"The answer is: {row.outputs[0]} because it is so and not in any other way", row.context)


@EVERY
def test_no_answer_is_too_common(name):
    answers = Counter(row.outputs[0] for row in SUITE.of_task(name))
    labels = SUITE.tasks[name].constraints.labels
    assert answers.most_common(1)[0][1] <= (0.65 if labels else 0.1) * answers.total()
    if labels:
        assert set(answers) == set(labels)


@EVERY_HELD_OUT
def test_a_held_out_task_changes_exactly_one_key_part(name):
    seen, held_out = _pair(name)
    assert seen.role == "seen"
    for old, new in zip(seen.instructions, held_out.instructions, strict=True):
        assert sum(a != b for a, b in zip(old.key_parts, new.key_parts, strict=True)) == 1
        assert mask_instruction(old.text, old.key_parts) == mask_instruction(new.text, new.key_parts)
        assert old.text != new.text


@EVERY_HELD_OUT
def test_its_constraints_reject_the_answers_of_the_seen_task(name):
    seen, held_out = _pair(name)
    recipe = next(design.recipe for design in SEEN if design.name == seen.task)
    rows = SUITE.of_task(name, "test")
    rejected = [_broken(held_out, recipe.answer(row.context), row.context) for row in rows]
    assert sum(rejected) >= 0.9 * len(rows)
    for row in SUITE.of_task(seen.task, "test"):
        assert row.outputs[0] not in held_out.constraints.labels


@EVERY
def test_tasks_and_rows_survive_json(name):
    task = SUITE.tasks[name]
    assert Task.model_validate_json(task.model_dump_json()) == task
    for row in SUITE.of_task(name, "test"):
        assert Row.model_validate_json(row.model_dump_json()) == row


@pytest.mark.parametrize(
    ("recipe", "context", "answer"),
    [
        (Recipe("keep", ("animal",), " | "), "horse, hat, owl, red, saw", "horse | owl"),
        (Recipe("keep", ("colour",), ", ", "upper"), "horse, teal, owl, red, saw", "TEAL, RED"),
        (Recipe("first", delimiter=" / ", count=2), "bread, hat, saw, owl", "bread / hat"),
        (Recipe("first", delimiter="; ", case="capitalized", count=3), "bread, hat, saw, owl", "Bread; Hat; Saw"),
        (Recipe("reverse", delimiter=" - "), "bread, hat, saw", "saw - hat - bread"),
        (Recipe("odd", case="capitalized"), "bread, robe, pie", "Robe"),
        (Recipe("sort_numbers", ("up",), ", "), "71, 12, 38", "12, 38, 71"),
        (Recipe("sort_numbers", ("down",), ", "), "71, 12, 38", "71, 38, 12"),
        (Recipe("sort_names", ("up",), "; ", "lower"), "Tina, Boris, Leo", "boris; leo; tina"),
        (Recipe("record", ("age", "name"), " - "), "name: Leo, city: Oslo, age: 44", "44 - Leo"),
        (Recipe("kind", ("animal", "food"), labels=("A", "B")), "Leo saw the pie in Oslo.", "B"),
        (Recipe("kind", ("food", "animal"), labels=("A", "B")), "Leo saw the pie in Oslo.", "A"),
        (Recipe("mood", labels=("good", "bad")), "Leo said that the pie was superb.", "good"),
        (Recipe("mood", labels=("good", "bad")), "Leo said that the pie was nasty.", "bad"),
        (Recipe("contains", ("tool",), labels=("yes", "no")), "pie, owl, axe", "yes"),
        (Recipe("contains", ("tool",), labels=("yes", "no")), "pie, owl, hat", "no"),
        (Recipe("count", ("animal",), labels=DIGITS), "owl, axe, fox", "2"),
        (Recipe("count", ("animal",), labels=NUMBER_WORDS), "hat, axe, red", "zero"),
        (Recipe("larger", labels=("true", "false")), "45 and 44", "true"),
        (Recipe("larger", labels=("true", "false")), "44 and 45", "false"),
        (Recipe("parity", labels=("left", "right")), "Room 44 in Oslo belongs to Leo.", "left"),
        (Recipe("parity", labels=("left", "right")), "Room 45 in Oslo belongs to Leo.", "right"),
    ],
)
def test_answers_by_hand(recipe, context, answer):
    assert recipe.answer(context) == answer


def test_every_operation_is_used():
    assert {design.recipe.operation for design in SEEN} == set(OPERATIONS)


def test_concrete_phrases_say_more():
    short, concrete = (phrases(Recipe("first", delimiter="; ", count=3), concrete=flag) for flag in (False, True))
    assert short == ("take the first three items", ("separated by a semicolon",))
    assert concrete.what == "take the three items at the start of the list"
    assert concrete.form == ("separated by a semicolon with a blank after it",)


@pytest.mark.parametrize("design", [*SEEN, *HELD_OUT], ids=lambda design: design.name)
def test_contexts_fit_their_operation(design):
    rng = random.Random(11)
    for _ in range(100):
        context = design.recipe.context(rng)
        answer = design.recipe.answer(context)
        assert context
        assert answer == answer.strip()
        if design.recipe.delimiter:
            assert len(answer.split(design.recipe.delimiter)) >= 2


def test_word_lists_are_unambiguous():
    assert len({name[0] for name in NAMES}) == len(NAMES)
    assert len(KIND_OF) == sum(Counter(KIND_OF.values()).values())
    assert min(Counter(KIND_OF.values()).values()) >= 15
