"""The task folder for lm-evaluation-harness: whole without it, and with the same figures where it is installed."""

import importlib.util
import json
import random

import pytest
import yaml
from evaluation_models import byte_tokenizer, small_model
from hypothesis import given
from hypothesis import strategies as st

from kpig_fast.cli import main
from kpig_fast.data.collection import save_collection
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import Constraints, Demonstration, FormatRule, PoolInstruction, Row, Task, TaskCollection
from kpig_fast.data.suite import bundled_suite
from kpig_fast.evaluation.evaluate import Prediction, evaluate, score_predictions
from kpig_fast.evaluation.harness import p_of_task, percentage, process_results, read_questions, write_harness_tasks

RULES = {
    "acc": Constraints(labels=("yes", "no")),
    "match": Constraints(format=(FormatRule(kind="delimiter", text=", "),), spans_of_context=True),
    "rougeL": Constraints(max_words=2),
    "bleu": Constraints(),
    "f1": Constraints(labels=("yes",), format=(FormatRule(kind="lower"),), max_words=1),
    "gpt": Constraints(max_words=1),
}


def task(name, **fields):
    return Task(task=name, instructions=(PoolInstruction(text=f"Do {name}."),), **fields)


def collection():
    """A task of every metric; one that could only be judged; 3 rows each."""
    shown = (Demonstration(context="1", output="one"), Demonstration(context="2", output="two"))
    tasks = [task(name, metric=name, constraints=rules) for name, rules in RULES.items()]
    tasks += [task("judged", metric="gpt"), task("held", metric="acc", role="held_out", demonstrations=shown)]
    rows = [
        Row(
            task=one.task,
            id=f"{one.task}-{n}",
            context=f"yes, no {n} {{{{x}}}}",
            outputs=("yes", "no, yes"),
            split="test",
        )
        for one in tasks
        for n in range(3)
    ]
    return TaskCollection.of(tasks, rows)


class _Loader(yaml.SafeLoader):
    """Reads a function of the harness as its name."""


_Loader.add_constructor("!function", lambda loader, node: ("function", loader.construct_scalar(node)))


def configs(folder):
    return {path.stem: yaml.load(path.read_text(), _Loader) for path in folder.glob("*.yaml")}


def functions(value):
    """The names of all functions in a config."""
    if isinstance(value, tuple):
        return [value[1]]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [name for child in children for name in functions(child)]


def utils(folder):
    spec = importlib.util.spec_from_file_location("harness_utils", folder / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def written(tmp_path):
    write_harness_tasks(collection(), tmp_path / "tasks", name="ours", limit=2, demonstrations=1, max_new_tokens=7)
    return tmp_path / "tasks"


def test_the_folder_holds_what_its_files_name(written):
    found = configs(written)
    group = found.pop("ours")
    assert group["group"] == "ours"
    assert group["task"] == [found[name]["task"] for name in (*RULES, "held")]
    assert len(found) == len(group["task"])
    module = utils(written)
    named = {name for config in found.values() for name in functions(config)}
    assert named == {"utils.load", "utils.process_results", "utils.p_of_task", "utils.percentage"}
    assert all(callable(getattr(module, name.removeprefix("utils."))) for name in named)
    for config in found.values():
        assert (written / config["dataset_kwargs"]["file"]).exists()
        assert config["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": 7}
    assert {file.suffix for file in written.iterdir()} == {".yaml", ".jsonl", ".py"}


def test_the_data_can_be_read_from_wherever_the_folder_lies(written, tmp_path, monkeypatch):
    moved = written.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    data = utils(moved).load(file="acc.jsonl", pretrained="a model")["test"]
    assert list(data) == documents(moved, "acc")
    assert list(read_questions(moved / "held.jsonl")["test"]["id"]) == ["held-0", "held-1"]


def test_figures_of_a_task_are_those_that_it_defines(written):
    found = configs(written)
    figures = {name: [metric["metric"] for metric in found[name]["metric_list"]] for name in RULES}
    assert figures == {
        "acc": ["p", "v", "oos"],
        "match": ["p", "v", "wfr", "oos"],
        "rougeL": ["p", "v", "wr"],
        "bleu": ["p"],
        "f1": ["p", "v", "wfr", "oos", "wr"],
        "gpt": ["v", "wr"],
    }
    assert all(m["higher_is_better"] == (m["metric"] == "p") for name in RULES for m in found[name]["metric_list"])
    assert found["ours"]["aggregate_metric_list"] == [
        {"metric": figure, "aggregation": "mean", "weight_by_size": False} for figure in ("p", "v")
    ]


def test_the_prompts_are_those_of_the_evaluation(written):
    tokenizer = byte_tokenizer()
    encoder, source = PromptEncoder(tokenizer), collection()
    for name in ("acc", "held"):
        one = source.tasks[name]
        for document, row in zip(documents(written, name), source.of_task(name)[:2], strict=True):
            expected = encoder.prompt(one.instructions[0].text, row.context, one.demonstrations[:1])
            assert document["prompt"] == tokenizer.decode(expected)
            assert (document["id"], document["context"]) == (row.id, row.context)
    assert documents(written, "held")[0]["prompt"].count("Output:") == 2


def figures_of(folder, name, answers):
    """The figures of a task as the harness makes them: one call an answer, one a metric."""
    results = [process_results(d, [answer]) for d, answer in zip(documents(folder, name), answers, strict=True)]
    config = configs(folder)[name]
    module = utils(folder)
    return {
        one["metric"]: getattr(module, one["aggregation"][1].removeprefix("utils."))(
            [r[one["metric"]] for r in results]
        )
        for one in config["metric_list"]
    }


def test_figures_worked_out_by_hand(written):
    assert figures_of(written, "acc", ["yes", "maybe"]) == {"p": 50, "v": 50, "oos": 50}
    # The second has the wrong delimiter and is out of the context: 2 of 4 checks fail.
    assert figures_of(written, "match", ["no, yes", "up; down"]) == {"p": 50, "v": 50, "wfr": 50, "oos": 50}
    assert figures_of(written, "gpt", ["one", "one two"]) == {"v": 50, "wr": 50}


ANSWERS = st.sampled_from(
    ["yes", "no", "YES", "no, yes", "yes no", "", "  yes \n", "something else entirely", "naïve; no"]
)


@given(answers=st.lists(ANSWERS, min_size=2, max_size=2))
def test_figures_are_those_of_score_predictions(tmp_path_factory, answers):
    folder = tmp_path_factory.mktemp("tasks")
    source = collection()
    write_harness_tasks(source, folder, limit=2)
    for name in (*RULES, "held"):
        predictions = [
            Prediction(name, row.id, "", row.context, answer.strip(), row.outputs)
            for row, answer in zip(source.of_task(name)[:2], answers, strict=True)
        ]
        (expected,) = score_predictions(predictions, source).tasks
        found = figures_of(folder, name, answers)
        assert found.get("p") == expected.p
        assert found.get("v") == pytest.approx(expected.v)
        assert {k.upper(): v for k, v in found.items() if k not in "pv"} == pytest.approx(expected.rates)


def test_the_bundled_suite_and_its_right_answers(tmp_path):
    suite = bundled_suite(n_train=1, n_test=2)
    names = write_harness_tasks(suite, tmp_path)
    assert names == [f"kpig_suite_{name}" for name in suite.tasks]
    for name in suite.tasks:
        right = [document["references"][0] for document in documents(tmp_path, name)]
        figures = figures_of(tmp_path, name, right)
        assert figures.pop("p") == pytest.approx(100)
        assert set(figures.values()) <= {0}


def test_natural_instructions_folders(tmp_path, capsys):
    rows = [{"id": f"t-{n}", "input": f"text {n}", "output": [f"answer {n}"]} for n in range(6)]
    content = {"Definition": ["Answer it."], "Categories": ["Sorting"], "Instances": rows, "Positive Examples": []}
    data = tmp_path / "data"
    data.mkdir()
    (data / "task7_sorting.json").write_text(json.dumps(content))
    config = tmp_path / "run.yaml"
    values = {"source": "natural_instructions", "path": str(data), "n_test": 3}
    config.write_text(yaml.safe_dump({"model": "bundled", "output_dir": str(tmp_path / "run"), "data": values}))
    assert main(["harness", str(config), "--out", str(tmp_path / "tasks"), "--name", "ni"]) == 0
    assert "--tasks ni" in capsys.readouterr().out
    found = documents(tmp_path / "tasks", "task7_sorting")
    assert [(one["context"], one["references"]) for one in found] == [(f"text {n}", [f"answer {n}"]) for n in range(3)]
    assert configs(tmp_path / "tasks")["ni"]["task"] == ["ni_task7_sorting"]


def test_what_cannot_be_written_is_named(tmp_path):
    judged = TaskCollection.of([task("judged", metric="gpt")], [])
    with pytest.raises(ValueError, match="no task has constraints or a metric that works without a judge"):
        write_harness_tasks(judged, tmp_path)
    with pytest.raises(ValueError, match="task 'a/b' cannot name a file"):
        write_harness_tasks(TaskCollection.of([task("a/b")], []), tmp_path)
    with pytest.raises(ValueError, match="'empty' has no rows to ask"):
        write_harness_tasks(TaskCollection.of([task("empty")], []), tmp_path)


def test_shares_and_metrics_of_many_answers():
    assert percentage([1.0, 0.0, 0.0, 1.0, 0.5]) == 50
    items = [("acc", answer, ["a"]) for answer in "ab" * 5]
    random.Random(0).shuffle(items)
    assert p_of_task(items) == 50


def test_the_harness_finds_the_same_figures(tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer, source = small_model(max_position_embeddings=2048), byte_tokenizer(pad_token="</s>"), collection()
    write_harness_tasks(source, tmp_path, max_new_tokens=4)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["kpig_suite"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    expected = evaluate(model, tokenizer, source, encoder=PromptEncoder(tokenizer), max_new_tokens=4)
    for one in expected.tasks:
        figures = found["results"].get(f"kpig_suite_{one.task}", {})
        assert figures.get("p,none") == (None if one.p is None else pytest.approx(one.p))
        if one.v is not None:
            assert figures["v,none"] == pytest.approx(one.v)
    group = found["groups"]["kpig_suite"]
    assert (group["p,none"], group["v,none"]) == pytest.approx((expected.p_score(), expected.v_score()))


def test_a_folder_of_our_own_form(tmp_path):
    save_collection(collection(), tmp_path / "data")
    config = tmp_path / "run.yaml"
    values = {"source": "folder", "path": str(tmp_path / "data")}
    text = {"model": "bundled", "output_dir": str(tmp_path / "run"), "data": values, "evaluation": {"limit": 1}}
    config.write_text(yaml.safe_dump(text))
    assert main(["harness", str(config), "--out", str(tmp_path / "tasks")]) == 0
    assert len(documents(tmp_path / "tasks", "acc")) == 1
    assert "judged.yaml" not in {path.name for path in (tmp_path / "tasks").iterdir()}
