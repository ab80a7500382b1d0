"""The whole evaluation: questions asked, answers kept, figures right."""

import json
import subprocess
import sys

import pytest
from evaluation_models import byte_tokenizer, small_model, teach
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import Constraints, Demonstration, PoolInstruction, Row, Task, TaskCollection
from kpig_fast.data.suite import bundled_suite
from kpig_fast.evaluation.evaluate import (
    Prediction,
    evaluate,
    read_predictions,
    score_predictions,
    write_predictions,
)

TOKENIZER = byte_tokenizer()
ENCODER = PromptEncoder(TOKENIZER)


def task(name: str, text: str, **fields) -> Task:
    wordings = (PoolInstruction(text=text), PoolInstruction(text=f"{text} (reworded)", strategy="breadth"))
    return Task(task=name, instructions=wordings, **{"metric": "acc", **fields})


SHOWN = tuple(Demonstration(context=c, output=o) for c, o in (("r", "R"), ("s", "S"), ("t", "T")))
COLLECTION = TaskCollection.of(
    [
        task("copy", "Copy.", category="c1", constraints=Constraints(labels=("x", "y")), demonstrations=SHOWN),
        task("shout", "Shout.", role="held_out", constraints=Constraints(spans_of_context=True), demonstrations=SHOWN),
        task("judge", "Tell.", metric="gpt", constraints=Constraints(max_words=1)),
    ],
    [
        Row(task="copy", id="1", context="x", outputs=("x",), split="test"),
        Row(task="copy", id="2", context="y", outputs=("y", "why"), split="test"),
        Row(task="copy", id="3", context="z", outputs=("z",), split="test"),
        Row(task="copy", id="4", context="w", outputs=("w",), split="train"),
        Row(task="shout", id="5", context="p", outputs=("P",), split="test"),
        Row(task="judge", id="6", outputs=("a story",), split="test"),
    ],
)
# What the model below is taught to say: one right answer, one wrong one, one out of scope.
SAID = {"1": "x", "2": "x", "3": "zz", "5": "P", "6": "two words"}


def prompt_of(row: Row) -> list[int]:
    task = COLLECTION.tasks[row.task]
    shown = task.demonstrations[:2] if task.role == "held_out" else ()
    return ENCODER.prompt(task.instructions[0].text, row.context, shown)


@pytest.fixture(scope="module")
def model():
    model = small_model()
    rows = [row for row in COLLECTION.rows if row.split == "test"]
    teach(model, [(prompt_of(row), [*TOKENIZER(f" {SAID[row.id]}").input_ids, 257]) for row in rows], steps=150)
    return model


def run(model, **settings):
    return evaluate(model, TOKENIZER, COLLECTION, encoder=ENCODER, **settings)


def test_figures_of_a_model_whose_answers_are_known(model):
    copy, shout, judge = run(model).tasks
    assert (copy.task, copy.role, copy.category, copy.metric, copy.n) == ("copy", "seen", "c1", "acc", 3)
    assert copy.p == pytest.approx(100 / 3)
    assert copy.rates == {"OOS": pytest.approx(100 / 3)}
    # The capital letter is right, and no span of the context.
    assert (shout.p, shout.rates, shout.n) == (100, {"OOS": 100}, 1)
    assert (judge.p, judge.rates) == (None, {"WR": 100})


def test_predictions_are_kept_and_score_the_same_again(model, tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    result = run(model, predictions_path=path)
    assert [file.name for file in path.parent.iterdir()] == ["predictions.jsonl"]
    kept = read_predictions(path)
    assert {one.id: one.answer for one in kept} == SAID
    assert kept[1].references == ("y", "why")
    assert kept[0].prompt.endswith("Copy.\n\nInput: x\n\nOutput:")
    assert score_predictions(kept, COLLECTION) == result


def test_only_held_out_tasks_are_shown_examples(model, tmp_path):
    run(model, predictions_path=tmp_path / "two")
    run(model, predictions_path=tmp_path / "none", demonstrations=0)
    run(model, predictions_path=tmp_path / "all", demonstrations=9)
    shown = {name: read_predictions(tmp_path / name)[3].prompt.count("Input:") for name in ("none", "two", "all")}
    assert shown == {"none": 1, "two": 3, "all": 4}
    assert read_predictions(tmp_path / "two")[0].prompt.count("Input:") == 1


def test_tasks_split_and_limit_choose_the_questions(model, tmp_path):
    path = tmp_path / "predictions"
    assert [task.task for task in run(model, tasks=["judge", "copy"], limit=2, predictions_path=path).tasks] == [
        "judge",
        "copy",
    ]
    assert [one.id for one in read_predictions(path)] == ["6", "1", "2"]
    run(model, tasks=["copy"], split="train", predictions_path=path)
    assert [one.id for one in read_predictions(path)] == ["4"]


def test_all_tasks_share_the_batches(model, monkeypatch):
    sizes = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    run(model)
    assert sizes == [5]
    sizes.clear()
    run(model, batch_tokens=1)
    assert sizes == [1] * 5


def test_settings_reach_the_generation(model, tmp_path, capsys):
    path = tmp_path / "predictions"
    run(model, tasks=["judge"], max_new_tokens=4, progress=True, predictions_path=path)
    assert read_predictions(path)[0].answer == "two"
    assert "1/1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="row '1' of task 'copy' has"):
        run(model, max_new_tokens=250)


def test_generation_stops_where_the_encoder_ends_a_response(tmp_path):
    turns = byte_tokenizer()
    turns.add_special_tokens({"additional_special_tokens": ["<s>"]})
    turns.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<s>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    encoder = PromptEncoder(turns, template="chat")
    assert encoder.end_id == 256
    model = small_model()
    asked = encoder.prompt("Copy.", "x")
    teach(model, [(asked, [*turns("x").input_ids, 256, *turns("and more").input_ids, 257])])
    evaluate(model, turns, COLLECTION, encoder=encoder, tasks=["copy"], limit=1, predictions_path=tmp_path / "p")
    assert read_predictions(tmp_path / "p")[0].answer == "x"


def test_bad_requests_are_named(model):
    with pytest.raises(ValueError, match="unknown task 'paste'"):
        run(model, tasks=["paste"])
    with pytest.raises(ValueError, match=r"task 'copy' has no rows to ask in split 'validation'"):
        run(model, split="validation")
    with pytest.raises(ValueError, match="has no rows"):
        run(model, limit=0)


def said(task: str, answer: str, *references: str, context: str = "") -> Prediction:
    return Prediction(task, "1", "prompt", context, answer, references)


def test_scoring_follows_the_collection_of_the_day():
    predictions = [said("copy", "X", "x"), said("copy", "y", "y")]
    now = score_predictions(predictions, COLLECTION).tasks[0]
    # Letter case costs scope, not performance.
    assert (now.p, now.rates) == (100, {"OOS": 50})
    changed = COLLECTION.tasks["copy"].model_copy(update={"constraints": Constraints()})
    assert score_predictions(predictions, TaskCollection.of([changed], [])).tasks[0].rates == {}
    with pytest.raises(ValueError, match="unknown task 'paste'"):
        score_predictions([said("paste", "x", "x")], COLLECTION)


def test_predictions_survive_any_text(tmp_path):
    odd = [said("copy", 'a\u2028b\u0085c\n"d" \\ é 🎉', "ref\r\n", context="\t"), said("copy", "", "x", "y")]
    write_predictions(odd, tmp_path / "p")
    assert read_predictions(tmp_path / "p") == odd


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "p"
    write_predictions([said("copy", "old", "x")], path)

    def failing():
        yield said("copy", "new", "x")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write_predictions(failing(), path)
    assert [one.answer for one in read_predictions(path)] == ["old"]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "p"
    write_predictions([said("copy", "x", "x")], path)
    path.write_text(path.read_text() + json.dumps({"task": "copy", "id": 3}) + "\n")
    with pytest.raises(ValueError, match=r"p:2: no prediction(.|\n)*answer"):
        read_predictions(path)


def test_scoring_stored_answers_needs_no_torch():
    modules = "kpig_fast.evaluation.evaluate, kpig_fast.evaluation.history, kpig_fast.evaluation.half_listening"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_right_answers_of_the_bundled_suite_score_everything_and_violate_nothing():
    suite = bundled_suite(n_train=1, n_validation=1, n_test=30)
    right = [
        Prediction(row.task, row.id, "", row.context, row.outputs[0], row.outputs)
        for row in suite.rows
        if row.split == "test"
    ]
    result = score_predictions(right, suite)
    assert len(result.tasks) >= 18
    assert {task.p for task in result.tasks} == {100}
    assert result.v_score() == 0


def test_answers_to_the_old_wording_violate_the_held_out_tasks_of_the_suite():
    suite = bundled_suite(n_train=1, n_validation=1, n_test=30)
    for name in suite.names("held_out"):
        old = suite.tasks[name].changed_from
        assert old is not None
        answers = [
            Prediction(name, row.id, "", row.context, row.outputs[0], row.outputs) for row in suite.of_task(old, "test")
        ]
        half_listening = score_predictions(answers, suite).tasks[0]
        assert half_listening.v is not None
        assert half_listening.v > 20, name


def test_real_model_on_real_tasks(shared, tmp_path):
    folder = shared / "models" / "stories260K-sni"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    names = {"task429_senteval_tense": ("Past", "Present"), "task1583_bless_meronym_classification": ("0", "1")}
    lines = (shared / "data/sni_core/eval.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["task"] in names]
    wording = {row["task"]: PoolInstruction(text=row["definition"]) for row in found}
    collection = TaskCollection.of(
        [
            Task(task=name, instructions=(wording[name],), metric="acc", constraints=Constraints(labels=labels))
            for name, labels in names.items()
        ],
        [Row(task=r["task"], id=r["id"], context=r["input"], outputs=tuple(r["output"]), split="test") for r in found],
    )
    path = tmp_path / "predictions.jsonl"
    result = evaluate(model, tokenizer, collection, encoder=PromptEncoder(tokenizer), limit=20, predictions_path=path)
    assert [task.n for task in result.tasks] == [20, 20]
    assert result == score_predictions(read_predictions(path), collection)
    # This model answers in the asked form, at chance.
    digits = result.tasks[1]
    assert digits.rates["OOS"] < 50
    assert digits.p is not None
    assert 0 < digits.p < 100
