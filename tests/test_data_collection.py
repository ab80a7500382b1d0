"""Collections on disk: the round trip, and every kind of problem of tasks and rows."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpig_fast.data.collection import load_collection, save_collection
from kpig_fast.data.schema import (
    Change,
    Constraints,
    Demonstration,
    FormatRule,
    PoolInstruction,
    Row,
    Task,
    TaskCollection,
    make_instance,
)
from kpig_fast.data.validation import DataError

TENSE = {"task": "tense", "instructions": [{"text": "Say past or present.", "key_parts": ["past or present"]}]}
SORT = {"task": "sort", "role": "held_out", "instructions": [{"text": "Sort the words."}]}
ROW = {"task": "tense", "id": "1", "context": "He ran.", "outputs": ["past"]}

TEXT = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)
WORDING = TEXT.flatmap(
    lambda text: st.builds(
        lambda parts, strategy: PoolInstruction(text=text, key_parts=parts, strategy=strategy),
        st.sampled_from([(), (text,), ((0, 1),)]),
        st.sampled_from(["original", "breadth"]),
    )
)


def write(folder, tasks, rows):
    for name, items in (("tasks.jsonl", tasks), ("instances.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def problems(report) -> dict[str, list[str]]:
    return {kind: found.examples for kind, found in report.problems.items()}


def dropped(folder, rows) -> tuple[str, str]:
    """The one problem that loading ``rows`` reports: its kind and text, without the folder."""
    _, report = load_collection(write(folder, [TENSE, SORT], rows))
    assert report.dropped == 1
    ((kind, (text,)),) = problems(report).items()
    return kind, text.replace(f"{folder}/", "")


CONSTRAINTS = st.builds(Constraints, labels=st.lists(TEXT, max_size=2), max_words=st.none() | st.integers(1, 9))


@st.composite
def collections(draw) -> TaskCollection:
    names = draw(st.lists(TEXT, unique=True, max_size=3))
    tasks = [
        Task(
            task=name,
            category=draw(st.just("") | TEXT),
            role=draw(st.sampled_from(["seen", "held_out"])),
            instructions=tuple(draw(st.lists(WORDING, min_size=1, max_size=3))),
            metric=draw(st.sampled_from(["acc", "rougeL", "match"])),
            constraints=Constraints(
                labels=tuple(draw(st.lists(TEXT, max_size=2))),
                max_words=draw(st.none() | st.integers(1, 9)),
                format=tuple(FormatRule(kind="delimiter", text=text) for text in draw(st.lists(TEXT, max_size=2))),
            ),
            demonstrations=tuple(Demonstration(context=text, output="x") for text in draw(st.lists(TEXT, max_size=2))),
            changed=draw(st.none() | st.builds(Change, instruction=WORDING, constraints=CONSTRAINTS, old=CONSTRAINTS)),
            changed_from=draw(st.none() | TEXT),
        )
        for name in names
    ]
    rows = [
        Row(
            task=task.task,
            id=str(n),
            # The number keeps contents apart.
            context=f"{n} {draw(TEXT)}",
            outputs=tuple(draw(st.lists(TEXT, min_size=1, max_size=2))),
            split=draw(st.sampled_from(["train", "validation", "test"])),
        )
        for task in tasks
        for n in range(draw(st.integers(0, 3)))
    ]
    return TaskCollection.of(tasks, rows)


def test_a_change_may_be_given_by_offsets(tmp_path):
    wording = {"text": "Say PAST.", "key_part_spans": [[4, 8]]}
    change = {"instruction": wording, "constraints": {"labels": ["PAST"]}}
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**TENSE, "changed": change}))
    (tmp_path / "instances.jsonl").write_text(json.dumps(ROW))
    changed = load_collection(tmp_path, strict=True)[0].tasks["tense"].changed
    assert changed is not None
    assert changed.instruction.key_parts == ((4, 8),)
    assert changed.old is None


@given(collections())
@settings(max_examples=50, deadline=None)
def test_round_trip(tmp_path_factory, collection):
    folder = tmp_path_factory.mktemp("collection") / "new"
    save_collection(collection, folder)
    loaded, report = load_collection(folder, strict=True)
    assert loaded == collection
    assert list(loaded.tasks) == list(collection.tasks)
    assert report.kept == len(collection.rows)


def test_gzipped_files(tmp_path):
    write(tmp_path, [TENSE], [ROW])
    for name in ("tasks.jsonl", "instances.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    collection, report = load_collection(tmp_path)
    assert (list(collection.tasks), report.kept) == (["tense"], 1)


def test_output_may_be_one_text(tmp_path):
    rows = [{"task": "sort", "id": str(n), **output} for n, output in enumerate([{"output": "a"}, {"outputs": "b"}])]
    rows.append({"task": "sort", "id": "list", "output": ["c", "d"]})
    collection, _ = load_collection(write(tmp_path, [SORT], rows), strict=True)
    assert [row.outputs for row in collection.rows] == [("a",), ("b",), ("c", "d")]


def test_loaded_key_parts_mask(tmp_path):
    collection, _ = load_collection(write(tmp_path, [TENSE], [ROW]))
    assert make_instance(collection.tasks["tense"], collection.rows[0]).masked_instruction() == "Say [MASK]."


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tasks\.jsonl nor tasks\.jsonl\.gz; give the folder"):
        load_collection(tmp_path)
    write(tmp_path, [TENSE], [])
    (tmp_path / "instances.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither instances\.jsonl nor"):
        load_collection(str(tmp_path))


@pytest.mark.parametrize(
    ("bad", "kind", "text"),
    [
        ({"outputs": ...}, "missing field", "outputs: is missing; add it"),
        ({"task": ...}, "missing field", "task: is missing; add it"),
        ({"outputs": []}, "empty", "outputs: is empty; fill it in"),
        ({"outputs": ["x", " "]}, "empty", "outputs[1]: is empty; fill it in or drop the row"),
        ({"id": ""}, "empty", "id: is empty; fill it in"),
        ({"contxt": "c"}, "schema", "contxt: unknown field; did you mean 'context'?"),
        ({"output": "x"}, "schema", "output: unknown field; did you mean 'outputs'?"),
        ({"split": "dev"}, "schema", "split: Input should be 'train', 'validation' or 'test', not 'dev'"),
        ({"task": "tens"}, "schema", "task: no good task is called 'tens' (did you mean 'tense'?); add the task or"),
        ({"id": "1"}, "duplicate", "id: '1' is that of instances.jsonl:1; give each row of a task its own"),
        ({"context": " He ran. "}, "duplicate", "row: repeats instances.jsonl:1; keep one of them"),
    ],
)
def test_bad_row_is_dropped_and_named(tmp_path, bad, kind, text):
    row = {name: value for name, value in {**ROW, "id": "2", "context": "new", **bad}.items() if value is not ...}
    assert dropped(tmp_path, [ROW, row])[0] == kind
    assert dropped(tmp_path, [ROW, row])[1].startswith(f"instances.jsonl:2: {text}")


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("order", [1, -1])
def test_leaked_row_leaves_training_not_evaluation(tmp_path, split, order):
    rows = [{**ROW, "id": "a"}, {**ROW, "id": "b", "split": split}][::order]
    collection, report = load_collection(write(tmp_path, [TENSE], rows))
    assert [row.split for row in collection.rows] == [split]
    line = {1: 2, -1: 1}[order]
    (text,) = problems(report)["leaked test row"]
    assert f"split: the row is also in evaluation, {tmp_path}/instances.jsonl:{line}; keep it out of training" in text


def test_same_content_elsewhere_is_no_problem(tmp_path):
    tasks = [TENSE, {**TENSE, "task": "other"}]
    rows = [
        ROW,
        {**ROW, "task": "other", "split": "test"},
        {**ROW, "id": "2", "context": "He runs.", "split": "test"},
        {**ROW, "id": "3", "outputs": ["present"], "split": "test"},
    ]
    assert load_collection(write(tmp_path, tasks, rows), strict=True)[1].kept == 4


def test_bad_wording_leaves_the_others(tmp_path):
    wordings = [
        {"text": "Say yes.", "key_parts": ["no"]},
        {"text": "Answer yes.", "key_parts": ["yes"]},
        {"txt": "Reply yes."},
        "Reply.",
        {"text": "  "},
    ]
    collection, report = load_collection(write(tmp_path, [{"task": "a", "instructions": wordings}], []))
    assert [wording.text for wording in collection.tasks["a"].instructions] == ["Answer yes."]
    place = f"{tmp_path}/tasks.jsonl:1: instructions"
    found = problems(report)
    assert found["key part not found"][0].startswith(f"{place}[0]: key_parts: key part 'no' does not occur")
    assert found["missing field"] == [f"{place}[2]: text: is missing; add it"]
    assert found["schema"] == [f"{place}[3]: row: is a str; write one JSON object"]
    assert found["empty"] == [f"{place}[4]: text: is empty; fill it in or drop the row"]


def test_offsets_beside_texts_must_agree(tmp_path):
    text = "Say yes or no."
    wordings = [
        {"text": text, "key_parts": ["yes", "no"], "key_part_spans": [[4, 7], [11, 13]]},
        {"text": text, "key_part_spans": [[4, 7]]},
        {"text": text, "key_parts": ["yes"], "key_part_spans": [[5, 8]]},
        {"text": text, "key_part_spans": [[4]]},
        {"text": text, "key_part_spans": [[4, 99]]},
    ]
    collection, report = load_collection(write(tmp_path, [{"task": "a", "instructions": wordings}], []))
    good = collection.tasks["a"].instructions
    assert [wording.key_parts for wording in good] == [((4, 7), (11, 13)), ((4, 7),)]
    place = f"{tmp_path}/tasks.jsonl:1: instructions"
    assert problems(report)["key part not found"][0] == (
        f"{place}[2]: key_part_spans: cut out ['es '], not ['yes']; correct or drop one"
    )
    assert problems(report)["key part not found"][1].startswith(f"{place}[4]: key_parts: key part (4, 99) is no span")
    assert problems(report)["schema"][0].startswith(f"{place}[3]: key_part_spans: are no [start, end] offsets")


def test_task_without_a_good_wording_takes_its_rows_along(tmp_path):
    task = {"task": "tense", "instructions": [{"text": "Say yes.", "key_parts": ["no"]}]}
    collection, report = load_collection(write(tmp_path, [task, SORT], [ROW]))
    assert list(collection.tasks) == ["sort"]
    assert (report.kept, report.dropped) == (0, 1)
    assert problems(report)["empty"] == [f"{tmp_path}/tasks.jsonl:1: instructions: is empty; fill it in"]
    assert problems(report)["schema"][0].startswith(f"{tmp_path}/instances.jsonl:1: task: no good task is called")


def test_task_given_twice(tmp_path):
    again = {**TENSE, "category": "other"}
    collection, report = load_collection(write(tmp_path, [TENSE, again], []))
    assert collection.tasks["tense"].category == ""
    assert problems(report) == {
        "duplicate": [f"{tmp_path}/tasks.jsonl:2: task: 'tense' is given twice; keep one of them"]
    }


def test_strict(tmp_path):
    write(tmp_path, [TENSE], [ROW, {**ROW, "id": "2"}])
    with pytest.raises(DataError, match="1 rows kept, 1 dropped") as caught:
        load_collection(tmp_path, strict=True)
    assert list(caught.value.report.problems) == ["duplicate"]


def test_a_wording_problem_alone_is_enough_for_strict(tmp_path):
    wordings = [*TENSE["instructions"], {"text": "Say yes.", "key_parts": ["no"]}]
    write(tmp_path, [{**TENSE, "instructions": wordings}], [ROW])
    with pytest.raises(DataError):
        load_collection(tmp_path, strict=True)


def test_progress_bar(tmp_path, capsys):
    load_collection(write(tmp_path, [TENSE], [ROW]), progress=True)
    assert "reading" in capsys.readouterr().err
