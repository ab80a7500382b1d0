"""The command kpig: what it writes, prints and returns."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from small_run import TASKS, write_config

from kpig_fast import cli
from kpig_fast.cli import _by_name, main
from kpig_fast.failures import explain


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


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a/log.jsonl"),
            1,
            "No space left on device: runs/a/log.jsonl; free space or choose another output_dir; "
            "the same command goes on where it stopped",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "Disk quota exceeded: {run}; free space or choose"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 1, "Permission denied: runs/a; allow access or"),
        (
            OSError(errno.EIO, "Input/output error", "f"),
            1,
            "Input/output error: f; choose another output_dir; the same",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "conf"), 2, "Is a directory: 'conf'"),
        (OSError("lab/modle is not a valid model identifier"), 2, "lab/modle is not a valid model identifier"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on where it stopped"),
    ],
)
def test_what_stops_a_run_is_one_line(small_folder, tmp_path, capsys, monkeypatch, error, code, message):
    monkeypatch.setattr("kpig_fast.training.stream.Stream.open", raising(error))
    run = tmp_path / "run"
    arguments = ["train", str(write_config(small_folder, run))]
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kpig train: {message.format(run=run)}" if code != 2 else "kpig train: ")
    assert message.format(run=run) in line
    with pytest.raises(type(error)):
        main([*arguments, "--debug"])


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1),
        (OSError("no such model"), 2),
        (RuntimeError("no such model"), 2),
    ],
)
def test_a_sentence_of_its_own_is_kept(cause, code):
    error = OSError("runs/a did not take the file; free space")
    error.__cause__ = cause
    assert explain(error, "train", None) == (code, "runs/a did not take the file; free space")


def test_other_commands_name_their_own_option(instances, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_load_scorer", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert main(["score", str(instances), "--model", "m", "--out", "o.jsonl"]) == 1
    expected = (
        "kpig score: No space left on device: o.jsonl; free space or choose another --out; run the command again\n"
    )
    assert capsys.readouterr().err == expected


def test_a_defect_keeps_its_traceback(small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kpig_fast.training.stream.Stream.open", raising(RuntimeError("a defect")))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", str(write_config(small_folder, tmp_path / "run"))])


def limit_files_to(n_bytes):
    """For ``preexec_fn``: a write beyond ``n_bytes`` fails as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

    return limit


@pytest.mark.parametrize("write", [lambda x, path: save_file({"x": x}, path), torch.save], ids=["safetensors", "torch"])
def test_a_file_of_tensors_that_did_not_fit_is_recognised(tmp_path, write):
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    try:
        limit_files_to(1000)()
        with pytest.raises(Exception) as raised:
            write(torch.zeros(1000), tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert not isinstance(raised.value, OSError)
    explained = explain(raised.value, "train", tmp_path)
    assert explained is not None
    code, text = explained
    assert code == 1
    assert f": {tmp_path}; free space or choose another output_dir" in text


def test_a_run_on_a_full_disk_says_so_and_goes_on_afterwards(small_folder, tmp_path):
    run = tmp_path / "run"
    config = write_config(small_folder, run, stream={"order": list(TASKS[:1])})
    command = [sys.executable, "-m", "kpig_fast.cli", "train", str(config), "--quiet"]
    # The plans and logs fit, the weights (more than 100 kB) do not.
    full = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit_files_to(60_000))
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert f"kpig train: File too large: {run}" in full.stderr
    assert "free space or choose another output_dir; the same command goes on where it stopped" in full.stderr
    assert not (run / "step-000" / "COMPLETE").exists()
    assert main(command[3:]) == 0
    assert (run / "step-000" / "COMPLETE").exists()


def test_only_the_first_of_several_processes_prints_the_table(small_folder, tmp_path, capsys, monkeypatch):
    config = write_config(small_folder, tmp_path / "run", stream={"order": list(TASKS[:1])})
    monkeypatch.setattr("kpig_fast.processes.rank", lambda: 1)
    monkeypatch.setattr("kpig_fast.training.stream.Stream.run", lambda _: None)
    assert main(["train", str(config), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


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
