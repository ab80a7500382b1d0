"""The example for scripts of one's own: short, offline, and what it saves has learnt its data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpig_fast.data.base_model import base_model_path
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.instances import read_instances

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, DATA = ROOT / "examples" / "train_lora.py", ROOT / "examples" / "alpaca.json"

# The script trains for some seconds.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The folder in which the script ran, and what it printed."""
    folder = tmp_path_factory.mktemp("example")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def mean_loss(model, pairs) -> float:
    """Nats a response token, by one plain forward pass for each instance."""
    total, n = 0.0, 0
    for pair in pairs:
        ids = torch.tensor([[*pair.complete_ids, *pair.response_ids]])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits[0, len(pair.complete_ids) - 1 : -1]
        total += float(cross_entropy(logits.double(), torch.tensor(pair.response_ids), reduction="sum"))
        n += len(pair.response_ids)
    return total / n


def test_it_is_short_and_its_data_is_alpaca_form():
    assert len(SCRIPT.read_text("utf-8").splitlines()) <= 60
    rows = json.loads(DATA.read_text("utf-8"))
    assert all({"instruction", "input", "output", "key_parts"} <= set(row) for row in rows)
    instances, report = read_instances(DATA, strict=True)
    assert len(instances) == len(rows)
    assert not report.problems
    assert all(instance.masked_instruction() != instance.instruction for instance in instances)


def test_it_prints_the_gain_and_falling_losses_of_both_steps(finished):
    _, printed = finished
    gains = re.findall(r"^(\w+): mean gain before training (-?[\d.]+)$", printed, re.MULTILINE)
    assert [task for task, _ in gains] == ["reverse", "last"]
    epochs = re.findall(r"^  epoch (\d): cross-entropy ([\d.]+) nats, divergence ([\d.]+) bits$", printed, re.MULTILINE)
    assert [int(epoch) for epoch, _, _ in epochs] == [1, 2] * 2
    losses = [float(loss) for _, loss, _ in epochs]
    assert losses[0] > losses[1]
    assert losses[2] > losses[3]
    assert all(float(divergence) > 0 for _, _, divergence in epochs)


def test_the_adapter_that_it_saves_has_learnt_both_tasks(finished):
    folder, _ = finished
    path = base_model_path()
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(path))
    instances, _ = read_instances(DATA)
    pairs = {task: encoder.encode_all([i for i in instances if i.task == task]) for task in ("reverse", "last")}
    before = {task: mean_loss(base, of_task) for task, of_task in pairs.items()}
    adapted = PeftModel.from_pretrained(base, str(folder / "runs" / "lora" / "adapter"))
    for task, of_task in pairs.items():
        assert mean_loss(adapted, of_task) < before[task]
