"""JSON files: every broken byte has a place, and nobody sees half a file."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpig_fast.data.files import read_object, read_rows, write_lines
from kpig_fast.data.validation import RowError, ValidationReport

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(blacklist_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=6,
)


def read(path) -> tuple[list, ValidationReport]:
    report = ValidationReport()
    return list(read_rows(path, report)), report


def examples(report: ValidationReport) -> list[str]:
    return [line for found in report.problems.values() for line in found.examples]


def test_broken_third_line_is_named_with_line_and_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3 "b": 4}\n{"a": 5}\n')
    rows, report = read(path)
    assert rows == [(f"{path}:1", {"a": 1}), (f"{path}:2", {"a": 2}), (f"{path}:4", {"a": 5})]
    assert report.dropped == 1
    assert examples(report) == [f"{path}:3: column 9: Expecting ',' delimiter; correct the JSON"]


def test_line_cut_short_names_a_column_of_its_own_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1\n{"a": 2}\n')
    rows, report = read(path)
    assert rows == [(f"{path}:2", {"a": 2})]
    assert examples(report) == [f"{path}:1: column 8: Expecting ',' delimiter; correct the JSON"]


@pytest.mark.parametrize("line", ["null", "3", '"text"', "true", "false"])
def test_line_that_is_no_object(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n")
    rows, report = read(path)
    assert len(rows) == report.dropped == 1
    kind = type(json.loads(line)).__name__
    assert examples(report) == [f"{path}:2: row: is a {kind}; write one JSON object"]


def test_blank_lines_keep_the_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n   \n\n{"a": 2}')
    assert [where for where, _ in read(path)[0]] == [f"{path}:2", f"{path}:5"]


def test_line_that_is_no_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n{"a": 1}\n')
    rows, report = read(path)
    assert [row for _, row in rows] == [{"a": 1}]
    assert examples(report) == [f"{path}:1: byte 8: invalid start byte; save the file as UTF-8"]


def test_byte_order_mark_and_crlf(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": "é"}\r\n{"a": 2}\r\n'.encode())
    rows, report = read(path)
    assert [row for _, row in rows] == [{"a": "é"}, {"a": 2}]
    assert not report.problems


def test_separators_inside_texts_do_not_split_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y\x85z"}\n', encoding="utf-8")
    assert [row for _, row in read(path)[0]] == [{"a": "x\u2028y\x85z"}]


def test_json_list_names_the_index(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n [{"a": 1},\n 7, {"a": 2}]')
    rows, report = read(path)
    assert rows == [(f"{path}[0]", {"a": 1}), (f"{path}[2]", {"a": 2})]
    assert examples(report) == [f"{path}[1]: row: is a int; write one JSON object"]


def test_broken_json_list_names_line_and_column(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n {"a": 2},\n {"a" 3}]')
    rows, report = read(path)
    assert rows == []
    assert examples(report) == [f"{path}: line 3 column 7: Expecting ':' delimiter; correct the JSON"]


def test_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert [where for where, _ in read(path)[0]] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_broken_gzip_is_a_problem_of_the_file(tmp_path, damage):
    path = tmp_path / "rows.jsonl.gz"
    text = b'{"a": 1}\n' * 50
    whole = bytearray(gzip.compress(text))
    if damage == "flipped":
        whole[-8] ^= 0xFF
    path.write_bytes({"cut": whole[:-12], "flipped": whole, "plain": text}[damage])
    _, report = read(path)
    (found,) = (line for line in examples(report) if line.startswith(f"{path}: "))
    assert found.endswith("; fetch or compress it again")


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere.jsonl")


def test_one_object(tmp_path):
    path = tmp_path / "task.json"
    path.write_text('{\n "a": [1, 2]\n}')
    assert read_object(path) == {"a": [1, 2]}
    path.write_text('{\n "a": [1, 2\n}')
    with pytest.raises(RowError, match="line 3 column 1: Expecting ',' delimiter; correct the JSON"):
        read_object(path)
    path.write_text("[]")
    with pytest.raises(RowError, match="is a list; write one JSON object"):
        read_object(path)


@given(st.lists(st.dictionaries(st.text("abc", max_size=2), JSON, max_size=3), max_size=5))
@settings(deadline=None)
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "new" / "rows.jsonl"
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))
    assert list(path.parent.iterdir()) == [path]
    read_back, report = read(path)
    assert [row for _, row in read_back] == rows
    assert not report.problems


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    def lines():
        yield "new"
        raise RuntimeError("no more")

    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    with pytest.raises(RuntimeError, match="no more"):
        write_lines(path, lines())
    assert path.read_text() == "old\n"
