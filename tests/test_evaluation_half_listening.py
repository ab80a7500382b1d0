"""The half-listening test: which rows are asked and how, what is counted, and that stored answers give it again."""

import pytest
from evaluation_models import byte_tokenizer, small_model, teach

from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import (
    Change,
    Constraints,
    Demonstration,
    FormatRule,
    Instance,
    PoolInstruction,
    Row,
    Task,
    TaskCollection,
)
from kpig_fast.data.suite import bundled_suite
from kpig_fast.evaluation.evaluate import Prediction, read_predictions
from kpig_fast.evaluation.half_listening import (
    Obedience,
    check_changed_questions,
    half_listening,
    mean_obedience,
    score_obedience,
)

TOKENIZER = byte_tokenizer(pad_token="</s>")
ENCODER = PromptEncoder(TOKENIZER)
COMMAS = Constraints(format=(FormatRule(kind="delimiter", text=", "),))
BARS = Constraints(format=(FormatRule(kind="delimiter", text=" | "),))
CHANGE = Change(instruction=PoolInstruction(text="Join by bars."), constraints=BARS)
ANSWERS = {"ab": "a, b", "c": "c", "de": "d, e", "fg": "f, g"}


def collection(**changes) -> TaskCollection:
    """A task whose answers have commas and whose change asks for bars, and one without change."""
    join = Task(
        task="join",
        instructions=(PoolInstruction(text="Join by commas."),),
        constraints=COMMAS,
        demonstrations=(Demonstration(context="xy", output="x, y"),),
        **{"changed": CHANGE, **changes},
    )
    copy = Task(task="copy", instructions=(PoolInstruction(text="Copy."),))
    rows = [Row(task="join", id=c, context=c, outputs=(a,), split="test") for c, a in ANSWERS.items()]
    return TaskCollection.of([copy, join], [*rows, Row(task="copy", id="1", context="a", outputs=("a",), split="test")])


def ask(model, data, **changes):
    options = {"encoder": ENCODER, "tasks": ["copy", "join"], "max_new_tokens": 6}
    return half_listening(model, TOKENIZER, data, **{**options, **changes})


@pytest.fixture(scope="module")
def stubborn():
    """A model that answers in commas, whatever it is told, but for one question."""
    told = {**ANSWERS, "de": "d | e"}
    pairs = [ENCODER.encode(Instance(CHANGE.instruction.text, answer, context)) for context, answer in told.items()]
    model = small_model()
    teach(model, [(pair.complete_ids, pair.response_ids) for pair in pairs], steps=150)
    return model


def test_rows_that_do_not_show_the_change_are_not_asked(stubborn, tmp_path):
    path = tmp_path / "answers.jsonl"
    (found,) = ask(stubborn, collection(), predictions_path=path)
    asked = read_predictions(path)
    assert [one.id for one in asked] == ["ab", "de", "fg"]
    assert all("Join by bars." in one.prompt and "x, y" not in one.prompt for one in asked)
    assert [one.answer for one in asked] == ["a, b", "d | e", "f, g"]
    assert found == Obedience("join", asked=100 / 3, old=200 / 3, neither=0, n=3)
    assert score_obedience(asked, collection()) == [found]


def test_a_limit_counts_the_rows_that_are_asked(stubborn, tmp_path):
    path = tmp_path / "answers.jsonl"
    assert ask(stubborn, collection(), limit=2, predictions_path=path)[0].n == 2
    assert [one.id for one in read_predictions(path)] == ["ab", "de"]
    assert ask(stubborn, collection(), limit=0) == []
    assert ask(stubborn, collection(), tasks=["copy"]) == []


def test_the_old_form_may_be_told_apart_otherwise(stubborn):
    change = CHANGE.model_copy(update={"old": Constraints(format=(FormatRule(kind="regex", text="a.*"),))})
    (found,) = ask(stubborn, collection(changed=change))
    assert (found.asked, found.old, found.neither) == pytest.approx((100 / 3, 100 / 3, 100 / 3))


def test_answers_to_no_change_are_named():
    answer = Prediction("copy", "1", "", "a", "a", ("a",))
    with pytest.raises(ValueError, match="task 'copy' has no changed wording"):
        score_obedience([answer], collection())


def test_questions_are_checked_before_anything_is_trained():
    long = CHANGE.model_copy(update={"instruction": PoolInstruction(text="Join by bars. " * 20)})
    options = {"encoder": ENCODER, "tasks": ["join"], "split": "test", "limit": 1, "max_new_tokens": 4}
    check_changed_questions(small_model(), collection(), **options)
    with pytest.raises(ValueError, match="the changed wording of row 'ab' of task 'join' has"):
        check_changed_questions(small_model(), collection(changed=long), **options)


def test_means_are_over_tasks():
    found = [Obedience("a", 100, 0, 0, n=1), Obedience("b", 0, 40, 60, n=9)]
    assert mean_obedience(found) == Obedience("", 50, 20, 30, n=10)
    assert mean_obedience([]) is None


def test_in_the_suite_right_answers_to_both_wordings_fall_apart():
    suite = bundled_suite(n_train=1, n_validation=1, n_test=30)
    changed = [name for name in suite.names("seen") if suite.tasks[name].changed]
    assert len(changed) == len(suite.names("held_out"))
    new = {str(suite.tasks[name].changed_from): name for name in suite.names("held_out")}
    for name in changed:
        for rows, share in ((suite.of_task(new[name], "test"), "asked"), (suite.of_task(name, "test"), "old")):
            answers = [Prediction(name, row.id, "", row.context, row.outputs[0], row.outputs) for row in rows]
            (found,) = score_obedience(answers, suite)
            # A list of one item has the form of both.
            assert getattr(found, share) > (99 if share == "asked" else 50), name
