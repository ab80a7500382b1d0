"""A stream with adapters, validation rows and trackers, and what it refuses before anything is trained."""

import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluation_models import small_model
from safetensors.torch import load_file
from small_run import TASKS, config_values
from transformers import AutoModelForCausalLM

from kpig_fast.evaluation.runs import read_run, step_folder
from kpig_fast.training import budget, stream
from kpig_fast.training.config import KPIGConfig
from kpig_fast.training.run_config import RunConfig
from kpig_fast.training.sizing import ModelShape, largest_tree
from kpig_fast.training.stream import Stream, end_tracking

TRAINING = {"per_device_train_batch_size": 4, "use_cpu": True, "learning_rate": 1e-2}
LORA = {"lora": {"r": 4, "lora_alpha": 8}, "training": TRAINING}


def run(folder: Path, out: Path, **changes) -> Path:
    Stream.open(RunConfig.model_validate(config_values(folder, out, **changes)), progress=False).run()
    return out


@pytest.fixture(scope="module")
def adapted(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(small_folder, tmp_path_factory.mktemp("lora") / "run", **LORA)


def adapter(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(step_folder(run, step) / "model" / "adapter_model.safetensors")


def test_one_adapter_is_trained_through_all_steps(adapted: Path) -> None:
    steps = [adapter(adapted, step) for step in range(len(TASKS))]
    for before, after in pairwise(steps):
        assert before.keys() == after.keys()
        assert all("lora_" in name and "lm_head" not in name for name in after)
        assert any(not torch.equal(after[name], x) for name, x in before.items())
    assert [step.training["instances"] for step in read_run(adapted) if step.training] == [6, 8, 8]


def test_the_kept_adapter_loads_with_its_base(adapted: Path, small_folder: Path) -> None:
    kept = AutoModelForCausalLM.from_pretrained(step_folder(adapted, 2) / "model")
    base = AutoModelForCausalLM.from_pretrained(small_folder / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert not torch.allclose(kept(ids).logits, base(ids).logits, atol=1e-4)
    weights = {name.replace(".base_layer", ""): x for name, x in kept.state_dict().items()}
    assert all(torch.equal(weights[name], x) for name, x in base.state_dict().items())


def test_an_adapter_goes_on_behind_a_step(adapted: Path, small_folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(adapted, again)
    expected = adapter(again, 2)
    shutil.rmtree(step_folder(again, 2))
    text = (again / "config.yaml").read_text("utf-8")
    (again / "config.yaml").write_text(text.replace(str(adapted), str(again)))
    run(small_folder, again, **LORA)
    assert all(torch.equal(expected[name], x) for name, x in adapter(again, 2).items())


def test_every_model_has_a_card_with_its_scores(adapted: Path) -> None:
    cards = [(step_folder(adapted, step) / "model" / "README.md").read_text("utf-8") for step in range(3)]
    assert all("Don't Half-listen" in card and str(adapted) not in card for card in cards)
    assert [sum(f"{task}" in card for task in TASKS) for card in cards] == [1, 2, 3]


def test_a_tracker_ends_its_experiment_with_each_step(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(finish=lambda: ended.append("trackio")))
    monkeypatch.setattr(stream, "end_tracking", lambda trackers: end_tracking([*trackers, "trackio"]))
    run(small_folder, tmp_path / "run", strategy="sft", training=TRAINING)
    assert ended == ["trackio"] * len(TASKS)
    end_tracking(["tensorboard"])
    assert len(ended) == len(TASKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"max_new_tokens": 500}}, "positions leave room for .* beside 500 new ones"),
        ({"training": {**TRAINING, "eval_strategy": "epoch"}}, "asks for validation rows, but copy has none"),
        ({"lora": {"rank": 4}}, "lora"),
    ],
)
def test_is_refused_before_training(small_folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(small_folder, tmp_path / "run", **changes)
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert not list(tmp_path.rglob("training.json"))
    # Once it is mended, it may go to the same folder.
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("free", [10**8, 2 * 10**8, 10**12])
def test_auto_takes_the_largest_tree_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    model = small_model()
    args = KPIGConfig(output_dir=str(tmp_path), max_tokens="auto", use_cpu=True)
    found = budget.tree_budget(model, args)
    here = sum(p.numel() * 4 for p in model.parameters())
    shape = ModelShape.of(model.config)
    largest = largest_tree(shape, budget.training_setup(shape, model, args, tokens=1, rows=1), free + here)
    assert found == min(largest, budget.CPU_TOKENS)
    assert budget.tree_budget(model, KPIGConfig(output_dir=str(tmp_path), max_tokens=77, use_cpu=True)) == 77


def test_a_step_says_what_planning_cost(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_values(small_folder, tmp_path / "run", training=TRAINING)
    Stream.open(RunConfig.model_validate(config)).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    # Two instances of every earlier task are scored.
    for n, line in enumerate(lines):
        assert re.search(
            rf"in [\d.]+ s, of them planning [\d.]+ s \({2 * n} instances of .*\), pre-pass [\d.]+ s", line
        )
    assert len(lines) == len(TASKS)
