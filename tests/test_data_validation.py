"""The report of what was wrong, and the checks that name a row's first problem."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kpig_fast.data.checks import check_key_parts, check_text, nearest, reject_misspelled, row_error
from kpig_fast.data.schema import Instance, Row, Task
from kpig_fast.data.validation import DataError, RowError, ValidationReport

TASK = {"task": "tense", "instructions": [{"text": "Say past or present.", "key_parts": ["past or present"]}]}


def problem(model, fields) -> RowError:
    with pytest.raises(ValidationError) as caught:
        model(**fields)
    valid = model.model_fields if hasattr(model, "model_fields") else model.__dataclass_fields__
    return row_error(caught.value, valid)


def test_clean_report():
    report = ValidationReport(kept=1200)
    report.require_clean(strict=True)
    assert str(report) == "1,200 rows kept, 0 dropped"


def test_report_counts_by_kind_and_keeps_the_first_examples():
    report = ValidationReport(kept=5)
    for n in range(1, 6):
        report.drop(f"a.jsonl:{n}", RowError("duplicate", f"row: repeats a.jsonl:{n - 1}; keep one of them"))
    report.drop("a.jsonl:9", RowError("empty", "output: is empty; fill it in"))
    report.add("tasks.jsonl:1", RowError("schema", "metric: wrong; correct the value"))
    report.unused.update(["licence", "licence", "source"])
    assert report.dropped == 6
    assert report.problems["duplicate"].count == 5
    assert report.problems["duplicate"].examples == [
        f"a.jsonl:{n}: row: repeats a.jsonl:{n - 1}; keep one of them" for n in (1, 2, 3)
    ]
    lines = str(report).splitlines()
    assert lines[0] == "5 rows kept, 6 dropped"
    assert lines[1].split() == ["schema", "1", "tasks.jsonl:1:", "metric:", "wrong;", "correct", "the", "value"]
    assert lines[2].split() == ["empty", "1", "a.jsonl:9:", "output:", "is", "empty;", "fill", "it", "in"]
    assert lines[3].startswith("  duplicate                5  a.jsonl:1: row: ")
    assert lines[6].strip() == "… and 2 more"
    assert lines[7] == "  fields not used: licence (2), source (1)"
    columns = {lines[n].index("a.jsonl") for n in (2, 3, 4, 5)}
    assert len(columns) == 1


def test_strict_raises_with_the_report():
    report = ValidationReport()
    report.drop("rows.jsonl:3", RowError("empty", "output: is empty; fill it in"))
    report.require_clean(strict=False)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: output: is empty") as caught:
        report.require_clean()
    assert caught.value.report is report
    assert isinstance(caught.value, ValueError)


def test_unused_fields_are_no_problem():
    report = ValidationReport()
    report.unused["licence"] = 1
    report.require_clean(strict=True)


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"instructions": TASK["instructions"]}, "missing field", "task: is missing; add it"),
        ({**TASK, "task": ""}, "empty", "task: is empty; fill it in"),
        ({**TASK, "instructions": []}, "empty", "instructions: is empty; fill it in"),
        ({**TASK, "instruction": "x"}, "schema", "instruction: unknown field; did you mean 'instructions'?"),
        ({**TASK, "zzz": 1}, "schema", "zzz: unknown field; did you mean '"),
        (
            {**TASK, "instructions": [{"text": "a", "keyparts": ["a"]}]},
            "schema",
            "instructions[0].keyparts: unknown field; did you mean 'key_parts'?",
        ),
        (
            {**TASK, "constraints": {"lables": ["a"]}},
            "schema",
            "constraints.lables: unknown field; did you mean 'labels'?",
        ),
        (
            {**TASK, "constraints": {"format": [{"kind": "upper"}, {"kind": "items", "minimun": 1}]}},
            "schema",
            "constraints.format[1].minimun: unknown field; did you mean 'minimum'?",
        ),
        (
            {**TASK, "demonstrations": [{"context": "c", "output": "o", "input": "c"}]},
            "schema",
            "demonstrations[0].input: unknown field; did you mean 'output'?",
        ),
        (
            {**TASK, "instructions": [{"text": "Say yes.", "key_parts": ["no"]}]},
            "key part not found",
            "instructions[0].key_parts: key part 'no' does not occur in the instruction 'Say yes.'; copy it verbatim",
        ),
        (
            {**TASK, "instructions": [{"text": "Say yes.", "key_parts": ["yes", [1, 2, 3]]}]},
            "schema",
            "instructions[0].key_parts[1]: [1, 2, 3] is no key part; give a text of the instruction or [start, end]",
        ),
        ({**TASK, "metric": "ACC"}, "schema", "metric: Input should be 'acc', 'f1', 'rougeL'"),
        ({**TASK, "metric": "x" * 100}, "schema", f"not '{'x' * 58}…; correct the value"),
    ],
)
def test_first_problem_of_a_task(fields, kind, text):
    error = problem(Task, fields)
    assert error.kind == kind
    assert text in str(error)


def test_first_problem_of_a_row_and_of_an_instance():
    assert str(problem(Row, {"task": "a", "id": "1"})) == "outputs: is missing; add it"
    assert str(problem(Row, {"task": "a", "id": "1", "outputs": ["x"], "split": "dev"})).endswith(
        "not 'dev'; correct the value"
    )
    assert str(problem(Instance, {"instruction": 3, "output": "x"})).startswith("instruction: Input should be a valid")


def test_misspelled_fields_are_refused_and_others_returned():
    fields = ["instruction", "output", "key_parts"]
    assert reject_misspelled(["instruction", "output", "licence", "source"], fields) == ["licence", "source"]
    # The right field is there as well, so the similar one is another thing.
    assert reject_misspelled(["output", "outputs"], fields) == ["outputs"]
    for name in ("keyparts", "key_part", "Key_Parts", "keyParts", "KEY_PARTS"):
        with pytest.raises(RowError, match=f"{name}: unknown field; did you mean 'key_parts'"):
            reject_misspelled(["instruction", "output", name], fields)


@given(st.lists(st.sampled_from(["instruction", "output", "key_parts", "id", "task"]), unique=True))
@settings(deadline=None)
def test_valid_fields_are_never_misspelled(names):
    assert reject_misspelled(names, ["instruction", "output", "key_parts", "id", "task"]) == []


def test_nearest_name():
    assert nearest("task_1", ["task_10", "other"]) == " (did you mean 'task_10'?)"
    assert nearest("zzz", ["task_10", "other"]) == ""


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_blank_text(blank):
    check_text("output", "x")
    with pytest.raises(RowError, match="output: is empty; fill it in or drop the row") as caught:
        check_text("output", blank)
    assert caught.value.kind == "empty"


def test_key_parts_of_a_text():
    check_key_parts("Say yes or no.", ["yes", (11, 13)])
    with pytest.raises(RowError, match="key_parts: key part 'maybe' does not occur") as caught:
        check_key_parts("Say yes or no.", ["maybe"])
    assert caught.value.kind == "key part not found"
    with pytest.raises(RowError, match=r"key_parts: key part \(4, 40\) is no span"):
        check_key_parts("Say yes or no.", [(4, 40)])
