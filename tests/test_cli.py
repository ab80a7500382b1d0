"""The command kpig: what it writes, prints and returns."""

import json
import os
import subprocess
import sys

import pytest
from small_run import write_config

from kpig_fast.cli import _by_name, main


@pytest.fixture
def instances(tmp_path):
    rows = [
        {"instruction": "Answer yes or no.", "input": "Is it?", "output": "yes", "key_parts": ["yes or no"], "id": "a"},
        {"instruction": "Say hello.", "output": "hello", "id": "b", "task": "greet"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_score_writes_one_row_an_instance(small_folder, instances, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    assert main(["score", str(instances), "--model", str(small_folder / "model"), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[0]["gain"] != 0.0
    assert rows[1]["gain"] == 0.0
    assert len(rows[0]["complete_log_probs"]) == len(rows[0]["masked_log_probs"]) == len("yes") + 2
    text = capsys.readouterr().out
    assert "greet" in text
    assert "fewer than apart" in text


def test_score_reads_a_collection_folder(small_folder, tmp_path):
    out = tmp_path / "scores.jsonl"
    arguments = ["score", str(small_folder / "data"), "--model", str(small_folder / "model"), "--out", str(out)]
    assert main([*arguments, "--split", "test", "--limit", "2"]) == 0
    assert [json.loads(line)["task"] for line in out.read_text().splitlines()] == [
        name for name in ("copy", "shout", "first", "last") for _ in range(2)
    ]


def test_bad_rows_are_dropped_with_a_report_or_stop_a_strict_run(small_folder, instances, tmp_path, capsys):
    bad = json.dumps({"instruction": "Say hi.", "output": "hi", "key_parts": ["bye"]})
    instances.write_text(instances.read_text() + bad + "\n")
    arguments = ["score", str(instances), "--model", str(small_folder / "model"), "--out", str(tmp_path / "s.jsonl")]
    assert main(arguments) == 0
    assert "data.jsonl:3" in capsys.readouterr().out
    assert main([*arguments, "--strict"]) == 2
    assert "'bye' does not occur" in capsys.readouterr().err


def test_train_runs_prints_and_reports(small_folder, tmp_path, capsys):
    run = tmp_path / "run"
    config = write_config(small_folder, run)
    assert main(["train", str(config), "--quiet", "--set", "stream.steps=2", "--set", "strategy=kpig"]) == 0
    assert "held" in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [tmp_path / "a" / "kpig", tmp_path / "b" / "kpig"]
    assert list(_by_name(runs)) == ["a/kpig", "b/kpig"]
    assert list(_by_name(runs[:1])) == ["kpig"]
    with pytest.raises(ValueError, match="given twice"):
        _by_name([runs[0], runs[0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "replay.task=1"], "did you mean 'tasks'"),
        (["--set", "replay.tasks"], "has no '='"),
    ],
)
def test_a_wrong_setting_is_named_with_exit_code_2(small_folder, tmp_path, capsys, arguments, message):
    config = write_config(small_folder, tmp_path / "run")
    assert main(["train", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_absent_files_are_named(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert main(["score", str(tmp_path / "none.jsonl"), "--model", "m", "--out", "o"]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count(str(tmp_path)) == 3


def test_env_names_versions_but_no_paths(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["packages"]["torch"]
    assert "/home" not in text
    assert "/root" not in text


@pytest.mark.parametrize(
    ("code", "limit"),
    [("import kpig_fast", 0.2), ("import sys; sys.argv = ['kpig', '--help']; import kpig_fast.cli", 0.5)],
)
def test_importing_is_quick_and_imports_no_torch(code, limit):
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-c", f"{code}\nimport sys; assert 'torch' not in sys.modules"], check=True)
        after = os.times()
        # Processor time: wall time would measure what else the machine does.
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < limit
