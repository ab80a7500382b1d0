"""Instances from rows in every accepted form, and from files, lists and datasets of them."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpig_fast.data.instances import as_instance, read_instances
from kpig_fast.data.schema import Instance
from kpig_fast.data.validation import DataError

GOOD = {"instruction": "Say yes or no.", "output": "yes", "key_parts": ["yes or no"]}
TEXT = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


def problems(report) -> dict[str, list[str]]:
    return {kind: found.examples for kind, found in report.problems.items()}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "i", "output": "o", "context": "c", "key_parts": ["i"], "task": "t", "id": "7"},
        {"instruction": "i", "output": "o", "input": "c", "key_parts": [[0, 1]], "task": "t", "id": 7},
        {"prompt": "i", "completion": "o", "context": "c", "key_parts": ("i",), "task": "t", "id": "7"},
        {"instruction": "i", "output": "o", "context": "c", "input": None, "key_parts": ["i"], "task": "t", "id": "7"},
    ],
)
def test_forms_with_the_same_meaning(row):
    instance = as_instance(row)
    assert instance.masked_instruction() == "[MASK]"
    assert (instance.instruction, instance.output, instance.context) == ("i", "o", "c")
    assert (instance.task, instance.id) == ("t", "7")


def test_messages():
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Say yes or no."},
            {"role": "assistant", "content": "yes"},
        ],
        "key_parts": ["brief", "yes or no"],
    }
    instance = as_instance(row)
    assert instance == Instance("Be brief.\n\nSay yes or no.", "yes", key_parts=("brief", "yes or no"))
    assert instance.masked_instruction() == "Be [MASK].\n\nSay [MASK]."


def test_earlier_turns_of_a_conversation_belong_to_the_instruction():
    turns = [("user", "Name a tree."), ("assistant", "Oak."), ("user", "Another."), ("assistant", "Elm.")]
    instance = as_instance({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert instance == Instance("Name a tree.\n\nOak.\n\nAnother.", "Elm.")


def test_an_instance_is_itself():
    instance = Instance("i", "o")
    assert as_instance(instance) is instance


@given(instruction=TEXT, output=TEXT, context=TEXT)
@settings(deadline=None)
def test_own_form_loses_nothing(instruction, output, context):
    row = {"instruction": instruction, "output": output, "context": context}
    assert as_instance(row) == Instance(instruction, output, context)


def test_unknown_form_names_the_fields_found_and_the_forms():
    with pytest.raises(ValueError, match=r"fields found: question, reply; give instruction and output .* messages"):
        as_instance({"question": "q", "reply": "r"})
    with pytest.raises(ValueError, match="fields found: none"):
        as_instance({})
    with pytest.raises(ValueError, match="row: is a str; give a mapping"):
        as_instance("text")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "i", "outptu": "o"}, "outptu: unknown field; did you mean 'output'?"),
        ({**GOOD, "contxt": "c"}, "contxt: unknown field; did you mean 'context'?"),
        ({"instruction": "i", "output": "o", "keyparts": []}, "keyparts: unknown field; did you mean 'key_parts'?"),
        ({**GOOD, "input": "c", "context": "d"}, "input: is given beside context; keep one of them"),
        ({"instruction": 3, "output": "o"}, "instruction: Input should be a valid string, not 3"),
        ({**GOOD, "key_parts": "yes"}, "key_parts: Input should be a valid tuple, not 'yes'"),
        ({**GOOD, "key_parts": [[1, 2, 3]]}, "key_parts[0]: [1, 2, 3] is no key part"),
        ({"messages": []}, "messages: is empty; end it with the assistant's answer"),
        ({"messages": [{"role": "user", "content": "q"}]}, "messages: ends with 'user'; end it with"),
        ({"messages": "hello"}, "messages: is no list of role and content"),
        ({"messages": [{"from": "human", "value": "q"}]}, "messages: is no list of role and content"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "messages: a content is no text"),
    ],
)
def test_bad_row_names_field_and_fix(row, text):
    with pytest.raises(ValueError) as caught:
        as_instance(row)
    assert text in str(caught.value)


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


BAD = [
    (GOOD, None, None),
    ({"instruction": "i"}, "missing field", "row: fields found: instruction; give instruction and output"),
    ({**GOOD, "output": " "}, "empty", "output: is empty; fill it in or drop the row"),
    ({**GOOD, "instruction": "", "key_parts": []}, "empty", "instruction: is empty"),
    ({**GOOD, "key_parts": ["maybe"]}, "key part not found", "key_parts: key part 'maybe' does not occur"),
    ({**GOOD, "key_parts": [[4, 99]]}, "key part not found", "key_parts: key part (4, 99) is no span"),
    ({**GOOD, "id": "again"}, "duplicate", "row: repeats {first}; keep one of them"),
    ({**GOOD, "task": 3}, "schema", "task: Input should be a valid string, not 3"),
    ({**GOOD, "output": "no"}, None, None),
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_every_problem_of_a_file(tmp_path, name):
    path = tmp_path / name
    rows = [row for row, _, _ in BAD]
    if name.endswith(".json"):
        path.write_text(json.dumps(rows))
        places = [f"{path}[{n}]" for n in range(len(rows))]
    else:
        write(path, rows)
        places = [f"{path}:{n}" for n in range(1, len(rows) + 1)]
    instances, report = read_instances(path)
    assert [i.output for i in instances] == ["yes", "no"]
    assert (report.kept, report.dropped) == (2, 7)
    found = problems(report)
    for place, (_, kind, text) in zip(places, BAD, strict=True):
        if kind:
            start = f"{place}: {text.format(first=places[0])}"
            assert any(example.startswith(start) for example in found[kind]), start
    assert sum(len(texts) for texts in found.values()) == 7


def test_strict_raises_after_reading_everything(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "output": ""}, {"instruction": "i"}])
    with pytest.raises(DataError) as caught:
        read_instances(str(path), strict=True)
    assert (caught.value.report.kept, caught.value.report.dropped) == (1, 2)
    assert f"{path}:2: output: is empty" in str(caught.value)
    assert f"{path}:3: row: fields found" in str(caught.value)


def test_strict_passes_good_rows(tmp_path):
    instances, report = read_instances(write(tmp_path / "rows.jsonl", [GOOD]), strict=True)
    assert instances == [as_instance(GOOD)]
    assert not report.problems


def test_broken_json_in_line_three(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n{json.dumps({**GOOD, "output": "no"})}\n{{"instruction": }}\n')
    instances, report = read_instances(path)
    assert len(instances) == 2
    assert problems(report) == {"schema": [f"{path}:3: column 17: Expecting value; correct the JSON"]}


def test_rows_that_differ_are_no_duplicates():
    rows = [GOOD, {**GOOD, "context": "c"}, {**GOOD, "key_parts": []}, {**GOOD, "task": "t"}]
    assert read_instances(rows, strict=True)[1].kept == 4


def test_list_of_rows_and_instances():
    instances, report = read_instances([Instance("i", "o"), GOOD, {"instruction": "i", "output": ""}])
    assert [i.output for i in instances] == ["o", "yes"]
    assert problems(report) == {"empty": ["row 2: output: is empty; fill it in or drop the row"]}


def test_fields_that_are_not_used_are_reported():
    _, report = read_instances([{**GOOD, "licence": "MIT"}, {**GOOD, "output": "no", "licence": "MIT", "source": "x"}])
    assert report.unused == {"licence": 2, "source": 1}
    assert not report.problems


def test_other_form_in_the_same_row_is_reported_as_not_used():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    instances, report = read_instances([{"prompt": "q", "prompt_id": "7", "messages": turns}])
    assert instances == [Instance("q", "a")]
    assert report.unused == {"prompt": 1, "prompt_id": 1}


def test_datasets_object():
    datasets = pytest.importorskip("datasets")
    rows = [{**GOOD, "context": None}, {**GOOD, "context": "c"}]
    split = datasets.Dataset.from_list(rows)
    instances, report = read_instances(split)
    assert instances == [as_instance(row) for row in rows]
    assert not report.problems
    with pytest.raises(ValueError, match="a mapping of 'train', 'test' is given; pass one of its values"):
        read_instances(datasets.DatasetDict({"train": split, "test": split}))


def test_progress_bar(capsys):
    read_instances([GOOD], progress=True)
    assert "reading" in capsys.readouterr().err
    read_instances([GOOD])
    assert capsys.readouterr().err == ""


@given(st.lists(st.dictionaries(st.sampled_from(["instruction", "output", "prompt", "messages"]), TEXT)))
@settings(deadline=None)
def test_every_row_is_kept_or_reported(rows):
    instances, report = read_instances(rows)
    assert len(instances) == report.kept
    assert report.kept + report.dropped == len(rows)
    assert report.dropped == sum(found.count for found in report.problems.values())
