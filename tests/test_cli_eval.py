"""The command ``kpig eval``: from run folders to files and tables."""

import csv
import json

import pytest
import yaml
from answered_runs import FIRST, LAST, collection, write_answered
from endpoint_server import chat, serving

from kpig_fast.cli import main
from kpig_fast.data.collection import save_collection
from kpig_fast.evaluation.runs import CONFIG_FILE
from kpig_fast.training.stored_runs import open_runs


@pytest.fixture
def runs(tmp_path):
    """Two seeds of kpig and of sft, as folders; their data lies beside them."""
    save_collection(collection(), tmp_path / "data")
    folders = []
    for strategy, held in (("sft", ("nnnn", "ynnn")), ("kpig", ("ynnn", "yyyn"))):
        for seed, answers in enumerate(held):
            folder = write_answered(tmp_path / f"{strategy}-{seed}", (FIRST, {**LAST, "h": answers}), strategy=strategy)
            write_config(folder, tmp_path / "data", strategy=strategy, seed=seed)
            folders.append(folder)
    return folders


def write_config(folder, data, **settings):
    values = {"model": "bundled", "output_dir": str(folder), "data": {"source": "folder", "path": str(data)}}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(values | settings))


def run_eval(*arguments):
    return main(["eval", *map(str, arguments), "--quiet"])


def test_eval_writes_and_prints(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_eval(*runs, "--out", out) == 0
    text = capsys.readouterr().out
    assert "## Differences from sft" in text
    assert "kpig (2)" in text
    assert f"wrote {out}" in text
    assert sorted(path.name for path in out.iterdir()) == ["comparison.json", "comparison.md", "scores.csv"]
    assert "by category and task" in (out / "comparison.md").read_text()
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert {row["run"] for row in rows} == {"", "sft-0", "sft-1", "kpig-0", "kpig-1"}
    data = json.loads((out / "comparison.json").read_text())
    held_out = [row for row in data["differences"] if (row["role"], row["figure"]) == ("held_out", "P")]
    assert [row["difference"]["value"] for row in held_out] == [37.5]
    assert data["changes"] == []


def test_eval_takes_another_baseline(runs, tmp_path, capsys):
    assert run_eval(*runs, "--out", tmp_path / "out", "--baseline", "kpig") == 0
    assert "## Differences from kpig" in capsys.readouterr().out
    assert run_eval(*runs, "--out", tmp_path / "out", "--baseline", "ewc") == 2
    assert "no arm is called 'ewc'" in capsys.readouterr().err


def test_eval_leaves_the_runs_as_they_were(runs, tmp_path):
    def content():
        return {path: path.read_bytes() for run in runs for path in sorted(run.rglob("*")) if path.is_file()}

    before = content()
    assert run_eval(*runs, "--out", tmp_path / "out") == 0
    assert content() == before


def test_wrong_folders_are_named_with_exit_code_2(runs, tmp_path, capsys):
    assert run_eval(tmp_path / "none", "--out", tmp_path / "out") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert run_eval(runs[0], runs[0], "--out", tmp_path / "out") == 2
    assert "given twice" in capsys.readouterr().err
    assert run_eval(runs[0], "--judge-url", "http://localhost", "--out", tmp_path / "out") == 2
    assert "add --judge MODEL" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_judge_is_asked_once(runs, tmp_path, capsys):
    save_collection(collection(metric="gpt"), tmp_path / "data")
    with serving(lambda *_: chat('{"reasonable": true}')) as server:
        arguments = (runs[0], "--out", tmp_path / "out", "--judge", "judge", "--judge-url", server.url)
        assert run_eval(*arguments) == 0
        asked = len(server.bodies)
        assert asked > 0
        assert run_eval(*arguments) == 0
        assert len(server.bodies) == asked
    # All four answers are reasonable, of which metrics.json has two as right.
    assert "task a: P was 50.00, is 100.00" in capsys.readouterr().out


def test_runs_share_the_data_that_they_have_in_common(runs):
    opened = open_runs({run.name: run for run in runs})
    assert [run.name for run in opened] == ["sft-0", "sft-1", "kpig-0", "kpig-1"]
    assert all(run.collection is opened[0].collection for run in opened)
    assert opened[0].collection == collection()
    assert [run.settings["seed"] for run in opened] == [0, 1, 0, 1]
    # Defaults are written out, so that a config of an older version is still the same arm.
    assert opened[0].settings["replay"] == {"tasks": 10, "instances": 10}


def test_a_setting_that_differs_makes_two_arms(runs, tmp_path, capsys):
    write_config(runs[3], tmp_path / "data", strategy="kpig", training={"lam": 0.1})
    assert run_eval(*runs[2:], "--out", tmp_path / "out") == 0
    assert "kpig lam=0.1 (1)" in capsys.readouterr().out
