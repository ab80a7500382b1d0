"""Real tasks and a real pretrained model: scoring and a short continual run through the command line."""

import json

import pytest
import yaml

from kpig_fast.cli import main
from kpig_fast.evaluation.runs import read_run

STREAM = (
    "task429_senteval_tense",
    "task575_air_dialogue_classification",
    "task340_winomt_classification_gender_pro",
    "task083_babi_t1_single_supporting_fact_answer_generation",
    "task1210_atomic_classification_madeupof",
    "task566_circa_classification",
)


@pytest.fixture
def model(shared):
    return str(shared / "models" / "stories260K-sni")


def test_score_natural_instructions(shared, model, tmp_path, capsys):
    core, out = shared / "data" / "sni_core", tmp_path / "scores.jsonl"
    arguments = ["score", str(core / "tasks"), "--side-file", str(core / "manifest.json")]
    assert main([*arguments, "--model", model, "--out", str(out), "--limit", "4"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["task"] for row in rows}) == 32
    assert 32 * 4 * 0.9 < len(rows) <= 32 * 4
    assert all(abs(row["gain"]) < 3 / 7 for row in rows)
    assert sum(row["gain"] for row in rows) / len(rows) > 0.02
    assert "fewer than apart" in capsys.readouterr().out


def test_train_natural_instructions(shared, model, tmp_path, capsys):
    core = shared / "data" / "sni_core"
    config = {
        "model": model,
        "output_dir": str(tmp_path / "run"),
        "data": {
            "source": "natural_instructions",
            "path": str(core / "tasks"),
            "side_files": [str(core / "manifest.json"), str(core / "pools.jsonl")],
            "seen": list(STREAM),
            "held_out": ["task1391_winogrande_easy_answer_generation"],
            "n_train": 16,
        },
        "stream": {"order": list(STREAM)},
        "replay": {"tasks": 2, "instances": 4},
        "training": {"learning_rate": 1e-3, "per_device_train_batch_size": 16, "use_cpu": True},
        "evaluation": {"limit": 4, "gain_rows": 2, "max_new_tokens": 6, "demonstrations": 0, "untrained": False},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", str(path), "--quiet"]) == 0
    history = read_run(tmp_path / "run")
    assert [step.tasks for step in history] == [(name,) for name in STREAM]
    assert [len(step.replayed) for step in history] == [0, 1, 2, 2, 2, 2]
    assert all(step.training["instances"] == 16 + 4 * len(step.replayed) for step in history)
    assert all(task.n == 4 for task in history[-1].evaluation.tasks)
    assert "run" in capsys.readouterr().out
