"""Natural Instructions task files: splits, roles, pools, side files, and the real subset."""

import json
from pathlib import Path

import pytest

from kpig_fast.data.collection import load_collection, save_collection
from kpig_fast.data.natural_instructions import load_natural_instructions
from kpig_fast.data.schema import Constraints, Demonstration, Task, make_instance
from kpig_fast.data.validation import DataError
from kpig_fast.evaluation.half_listening import obedience
from kpig_fast.method.masking import find_spans
from kpig_fast.training.data import load_data
from kpig_fast.training.run_config import DataConfig

DEFINITION = "Say past or present."


def task_file(**changes) -> dict:
    examples = [{"input": f"e{n}", "output": f"r{n}", "explanation": "why"} for n in range(3)]
    instances = [{"id": f"x-{n}", "input": f"sentence {n}", "output": ["past", "Past"]} for n in range(5)]
    raw = {
        "Contributors": ["somebody"],
        "Categories": ["Tense", "Other"],
        "Definition": [DEFINITION, "A second definition."],
        "Positive Examples": examples,
        "Negative Examples": [],
        "Instances": instances,
    }
    return {name: value for name, value in {**raw, **changes}.items() if value is not ...}


def write(folder: Path, **tasks) -> Path:
    for name, raw in tasks.items():
        (folder / f"{name}.json").write_text(json.dumps(raw))
    return folder


def side(folder: Path, name: str, *rows) -> Path:
    path = folder / name
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    return write(folder, b=task_file(), a=task_file(), c=task_file())


def problems(report) -> dict[str, list[str]]:
    return {kind: found.examples for kind, found in report.problems.items()}


def test_first_instances_are_the_test_rows(tasks):
    collection, report = load_natural_instructions(tasks, n_test=2, strict=True)
    assert list(collection.tasks) == ["a", "b", "c"]
    assert [row.id for row in collection.of_task("a", "test")] == ["x-0", "x-1"]
    assert [row.id for row in collection.of_task("a", "train")] == ["x-2", "x-3", "x-4"]
    assert collection.rows[0].outputs == ("past", "Past")
    assert report.kept == 15


def test_by_default_a_hundred(tasks):
    collection, _ = load_natural_instructions(tasks)
    assert {row.split for row in collection.rows} == {"test"}


def test_task_without_side_file(tasks):
    task = load_natural_instructions(tasks)[0].tasks["a"]
    assert [wording.text for wording in task.instructions] == [DEFINITION]
    assert task.instructions[0].key_parts == ()
    assert (task.category, task.role, task.metric) == ("Tense", "seen", "rougeL")
    assert task.demonstrations == tuple(Demonstration(context=f"e{n}", output=f"r{n}") for n in range(2))


def test_older_files_with_texts_instead_of_lists(tasks):
    instances = [{"input": f"s{n}", "output": "past"} for n in range(2)]
    write(tasks, a=task_file(Definition=DEFINITION, Categories="Tense", Instances=instances))
    collection, _ = load_natural_instructions(tasks, tasks=["a"], strict=True)
    assert collection.tasks["a"].category == "Tense"
    assert collection.tasks["a"].instructions[0].text == DEFINITION
    assert [(row.id, row.outputs) for row in collection.rows] == [("a-0", ("past",)), ("a-1", ("past",))]


def test_selection_and_order(tasks):
    assert list(load_natural_instructions(tasks, tasks=["c", "a"])[0].tasks) == ["c", "a"]
    collection, _ = load_natural_instructions(tasks, seen=["c"], held_out=["b"])
    assert (collection.names("seen"), collection.names("held_out")) == (["c"], ["b"])
    collection, _ = load_natural_instructions(tasks, tasks=["b", "a"], held_out=["b"])
    assert {name: task.role for name, task in collection.tasks.items()} == {"b": "held_out", "a": "seen"}


def test_order_of_the_side_file(tasks, tmp_path):
    path = side(tmp_path, "side.jsonl", {"task": "c"}, {"task": "elsewhere"}, {"task": "b"})
    assert list(load_natural_instructions(tasks, side_file=path)[0].tasks) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("written", "role"), [("stream", "seen"), ("seen", "seen"), ("heldout", "held_out"), ("held_out", "held_out")]
)
def test_role_names(tasks, tmp_path, written, role):
    path = side(tmp_path, "side.json", {"task": "a", "role": written})
    assert load_natural_instructions(tasks, side_file=path)[0].tasks["a"].role == role


def test_named_role_goes_before_the_side_file(tasks, tmp_path):
    path = side(tmp_path, "side.json", {"task": "a", "role": "stream"})
    assert load_natural_instructions(tasks, side_file=path, held_out=["a"])[0].tasks["a"].role == "held_out"


@pytest.mark.parametrize(
    "marks",
    [
        {"key_parts": ["past or present"]},
        {"key_part_spans": [[4, 19]]},
        {"key_parts": ["past or present"], "key_part_spans": [[4, 19]]},
    ],
)
def test_key_parts_of_the_definition(tasks, tmp_path, marks):
    path = side(tmp_path, "side.json", {"task": "a", "licence": ["MIT"], **marks})
    collection, _ = load_natural_instructions(tasks, side_file=str(path), strict=True)
    instance = make_instance(collection.tasks["a"], collection.rows[0])
    assert instance.masked_instruction() == "Say [MASK]."


def test_kind_label_sets_metric_and_labels(tasks, tmp_path):
    labelled = {"task": "a", "kind": "label", "labels": ["past", "present"]}
    path = side(tmp_path, "side.json", labelled, {"task": "b", "kind": "copy", "labels": None})
    collection, _ = load_natural_instructions(tasks, side_file=path)
    assert collection.tasks["a"].metric == "acc"
    assert collection.tasks["a"].constraints.labels == ("past", "present")
    assert collection.tasks["b"].metric == "rougeL"
    assert collection.tasks["b"].constraints.labels == ()


def test_metric_and_constraints_of_the_side_file(tasks, tmp_path):
    row = {"task": "a", "kind": "label", "labels": ["x"], "metric": "match", "constraints": {"max_words": 3}}
    task = load_natural_instructions(tasks, side_file=side(tmp_path, "s.json", row))[0].tasks["a"]
    assert (task.metric, task.constraints.max_words, task.constraints.labels) == ("match", 3, ())


def test_pool_puts_the_definition_first(tasks, tmp_path):
    other = {"text": "Past or present?", "strategy": "breadth", "key_parts": ["Past or present"]}
    own = {"text": DEFINITION, "strategy": "original", "key_parts": ["present"]}
    pool = side(tmp_path, "pools.jsonl", {"task": "a", "instructions": [other, own]})
    manifest = side(tmp_path, "manifest.json", {"task": "a", "role": "heldout", "key_parts": ["past"]})
    task = load_natural_instructions(tasks, side_file=[manifest, pool], strict=True)[0].tasks["a"]
    assert [(w.text, w.strategy, w.key_parts) for w in task.instructions] == [
        (DEFINITION, "original", ("present",)),
        ("Past or present?", "breadth", ("Past or present",)),
    ]
    assert task.role == "held_out"


def changed(tasks, tmp_path, **change) -> Task:
    row = {"task": "a", "changed_constraint": {"text": "Say PAST or PRESENT.", "key_parts": ["PAST"], **change}}
    task = load_natural_instructions(tasks, side_file=side(tmp_path, "side.jsonl", row), strict=True)[0].tasks["a"]
    assert task.changed is not None
    assert task.changed.instruction.text == "Say PAST or PRESENT."
    return task


def test_changed_labels(tasks, tmp_path):
    mapped = {"past": "PAST", "present": "PRESENT", "now": "PRESENT"}
    change = changed(tasks, tmp_path, label_map=mapped, key_part_spans=[[4, 8]]).changed
    assert change.instruction.key_parts == ((4, 8),)
    assert change.constraints == Constraints(labels=("PAST", "PRESENT"))
    assert change.old == Constraints(labels=("past", "present", "now"))


@pytest.mark.parametrize(
    ("rule", "new", "old"),
    [
        ("upper", ["ABC", "A 1.", "7"], ["abc", "Abc", "ABc", "A\nb"]),
        ("lower", ["abc", "a 1."], ["ABC", "Abc"]),
        ("quote", ['"abc"', '"a\nb"'], ["abc", '"abc', 'abc"', '"']),
        ("prefix:Re: ", ["Re: abc", "Re: a\nb"], ["abc", "re: abc", "abc Re: ", "Re: "]),
        ("suffix:.", ["abc.", "a\nb."], ["abc", ".", ".abc", "abcx"]),
    ],
)
def test_changed_rules_part_all_answers_in_two(tasks, tmp_path, rule, new, old):
    change = changed(tasks, tmp_path, rule=rule).changed
    for answers, share in ((new, "asked"), (old, "old")):
        for answer in answers:
            found = obedience([answer], change.constraints, change.old)
            assert found[share] == 100, (rule, answer, found)
    assert obedience([""], change.constraints, change.old)["neither"] == 100


@pytest.mark.parametrize("change", [{}, {"rule": "title"}, {"rule": "prefix:"}, {"rule": "upper", "label_map": {}}])
def test_a_change_says_one_thing(tasks, tmp_path, change):
    with pytest.raises(DataError, match="changed_constraint"):
        changed(tasks, tmp_path, **change)


def test_pool_without_the_definition_gets_it(tasks, tmp_path):
    other = {"text": "Past or present?", "key_parts": ["Past or present"]}
    row = {"task": "a", "instructions": [other], "key_part_spans": [[4, 8]]}
    task = load_natural_instructions(tasks, side_file=side(tmp_path, "side.jsonl", row))[0].tasks["a"]
    assert [(w.text, w.key_parts) for w in task.instructions] == [
        (DEFINITION, ((4, 8),)),
        ("Past or present?", ("Past or present",)),
    ]


def test_later_side_files_override(tasks, tmp_path):
    first = side(tmp_path, "1.json", {"task": "a", "role": "heldout", "key_parts": ["past"]})
    second = side(tmp_path, "2.jsonl", {"task": "a", "key_parts": ["present"]})
    task = load_natural_instructions(tasks, side_file=[first, second])[0].tasks["a"]
    assert (task.role, task.instructions[0].key_parts) == ("held_out", ("present",))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"task": "a", "role": "unseen"}, "side.jsonl:2: role: Input should be 'seen', 'stream', 'held_out' or"),
        ({"role": "seen"}, "side.jsonl:2: task: is missing; add it"),
        ({"task": "a", "keyparts": []}, "side.jsonl:2: keyparts: unknown field; did you mean 'key_parts'?"),
        ({"task": "a", "instructions": ["x"]}, "side.jsonl:2: instructions[0]: Input should be a valid dictionary"),
        ({"task": "a", "constraints": {"lables": []}}, "side.jsonl:2: constraints.lables: unknown field; did you mean"),
        (["a"], "side.jsonl:2: row: is a list; write one JSON object"),
    ],
)
def test_broken_side_file_stops_even_when_not_strict(tasks, tmp_path, row, text):
    with pytest.raises(DataError) as caught:
        load_natural_instructions(tasks, side_file=side(tmp_path, "side.jsonl", {"task": "b"}, row))
    assert text in str(caught.value)


def test_absent_side_file(tasks, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        load_natural_instructions(tasks, side_file=tmp_path / "nowhere.json")


def test_key_parts_that_do_not_occur_drop_the_wording(tasks, tmp_path):
    other = {"text": "Past or present?", "key_parts": ["Past or present"]}
    rows = [{"task": "a", "key_parts": ["future"], "instructions": [other]}, {"task": "b", "key_part_spans": [[9, 4]]}]
    path = side(tmp_path, "side.jsonl", *rows)
    collection, report = load_natural_instructions(tasks, side_file=path)
    assert [wording.text for wording in collection.tasks["a"].instructions] == ["Past or present?"]
    assert list(collection.tasks) == ["a", "c"]
    first, second = problems(report)["key part not found"]
    assert first.startswith(f"{path}:1: instructions[0]: key_parts: key part 'future' does not occur")
    assert second.startswith(f"{path}:2: instructions[0]: key_parts: key part (9, 4) is no span")


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"Definition": ...}, "missing field", "Definition: is missing; add it"),
        ({"Definition": []}, "empty", "Definition: is empty; fill it in"),
        ({"Definition": [" "]}, "empty", "instructions[0]: text: is empty"),
        ({"Instances": ...}, "missing field", "Instances: is missing; add it"),
        ({"Instances": ["x"]}, "schema", "Instances[0]: Input should be a valid dictionary"),
        ({"Positive Examples": [{"input": "x"}]}, "missing field", "Positive Examples[0].output: is missing"),
    ],
)
def test_broken_task_file_drops_the_task(tasks, changes, kind, text):
    write(tasks, a=task_file(**changes))
    collection, report = load_natural_instructions(tasks)
    assert list(collection.tasks) == ["b", "c"]
    assert problems(report)[kind][0].startswith(f"{tasks}/a.json: {text}")
    with pytest.raises(DataError):
        load_natural_instructions(tasks, strict=True)


def test_task_file_that_is_no_json_names_line_and_column(tasks):
    (tasks / "a.json").write_text('{\n "Definition": ["x"],\n "Instances" [\n]}')
    _, report = load_natural_instructions(tasks)
    assert problems(report)["schema"] == [
        f"{tasks}/a.json: line 3 column 14: Expecting ':' delimiter; correct the JSON"
    ]


def test_bad_instances_are_dropped_without_moving_the_split(tasks):
    instances = [{"id": str(n), "input": f"s{n}", "output": ["past"]} for n in range(6)]
    instances[0]["output"] = [""]
    del instances[1]["output"]
    instances[3]["input"] = "s2"
    instances[4]["input"] = "s5"
    write(tasks, a=task_file(Instances=instances))
    collection, report = load_natural_instructions(tasks, tasks=["a"], n_test=3)
    assert [(row.id, row.split) for row in collection.rows] == [("2", "test"), ("4", "train")]
    assert problems(report) == {
        "empty": [f"{tasks}/a.json: Instances[0]: outputs[0]: is empty; fill it in or drop the row"],
        "missing field": [f"{tasks}/a.json: Instances[1]: outputs: is missing; add it"],
        "leaked test row": [
            f"{tasks}/a.json: Instances[3]: split: the row is also in evaluation, {tasks}/a.json: Instances[2]; "
            "keep it out of training"
        ],
        "duplicate": [f"{tasks}/a.json: Instances[5]: row: repeats {tasks}/a.json: Instances[4]; keep one of them"],
    }


def test_validation_rows_lie_between_test_and_training_rows(tasks):
    instances = [{"id": str(n), "input": f"s{n}", "output": ["past"]} for n in range(6)]
    write(tasks, a=task_file(Instances=instances))
    collection, _ = load_natural_instructions(tasks, tasks=["a"], n_test=2, n_validation=3)
    assert [row.split for row in collection.rows] == ["test"] * 2 + ["validation"] * 3 + ["train"]
    config = DataConfig(source="natural_instructions", path=tasks, n_test=2, n_validation=3)
    assert [row.split for row in load_data(config)[0].of_task("a")] == [row.split for row in collection.rows]


def test_wrong_names(tasks, tmp_path):
    write(tasks, task1_tense=task_file())
    with pytest.raises(ValueError, match=r"no file task1_tens\.json in .* \(did you mean 'task1_tense'\?\)"):
        load_natural_instructions(tasks, tasks=["task1_tens"])
    with pytest.raises(ValueError, match=r"no file zz\.json"):
        load_natural_instructions(tasks, held_out=["zz"])
    with pytest.raises(ValueError, match="task 'a' is named both in seen and in held_out; keep one"):
        load_natural_instructions(tasks, seen=["a", "b"], held_out=["a"])
    with pytest.raises(FileNotFoundError, match=r"no task file \(\*\.json\) in .*; give the folder that holds"):
        load_natural_instructions(tmp_path)


def test_progress_bar(tasks, capsys):
    load_natural_instructions(tasks, progress=True)
    assert "reading tasks" in capsys.readouterr().err


@pytest.fixture(scope="module")
def core(shared):
    folder = shared / "data" / "sni_core"
    return load_natural_instructions(
        folder / "tasks", side_file=[folder / "manifest.json", folder / "pools.jsonl"], n_test=50, strict=True
    )


def test_real_tasks(core, shared):
    collection, report = core
    manifest = json.loads((shared / "data" / "sni_core" / "manifest.json").read_text())
    assert list(collection.tasks) == [entry["task"] for entry in manifest]
    assert (len(collection.names("seen")), len(collection.names("held_out"))) == (20, 12)
    assert (report.kept, report.dropped, report.problems) == (8000, 0, {})
    for name in collection.tasks:
        assert len(collection.of_task(name, "train")) == 200
        assert len(collection.of_task(name, "test")) == 50


def test_real_pools_and_key_parts(core):
    collection, _ = core
    for name, task in collection.tasks.items():
        assert len(task.instructions) == (9 if task.role == "seen" else 1), name
        assert len({wording.text for wording in task.instructions}) == len(task.instructions)
        assert len(task.demonstrations) == 2
        for wording in task.instructions:
            # No overlaps in this data: as many spans as key parts.
            assert len(find_spans(wording.text, wording.key_parts)) == len(wording.key_parts) >= 1


def test_real_splits_are_the_published_ones(core, shared):
    collection, _ = core
    for file, split in (("train.jsonl", "train"), ("eval.jsonl", "test")):
        with (shared / "data" / "sni_core" / file).open() as lines:
            published = [json.loads(line) for line in lines]
        ours = {(row.task, row.id): row for row in collection.rows if row.split == split}
        assert len(ours) == len(published)
        for row in published:
            found = ours[row["task"], row["id"]]
            assert (found.context, list(found.outputs)) == (row["input"], row["output"])
            assert collection.tasks[row["task"]].instructions[0].text == row["definition"]


def test_real_labels_allow_every_reference(core):
    collection, _ = core
    labelled = [name for name, task in collection.tasks.items() if task.metric == "acc"]
    assert len(labelled) == 19
    for name in labelled:
        labels = set(collection.tasks[name].constraints.labels)
        assert all(set(row.outputs) & labels for row in collection.of_task(name)), name


def test_real_collection_makes_the_round_trip(core, tmp_path):
    save_collection(core[0], tmp_path)
    assert load_collection(tmp_path, strict=True)[0] == core[0]
