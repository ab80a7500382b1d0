"""Two processes give what one does: DDP, FSDP2, ZeRO-2 and ZeRO-3 as the bundled config files say, on CPUs by gloo."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import distributed_worker
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import write_config
from training_cases import assert_same_weights, tiny, weights
from transformers import AutoModelForCausalLM

from kpig_fast.cli import main
from kpig_fast.evaluation.runs import read_run, step_folder

TESTS = Path(__file__).parent
WORKER = str(TESTS / "distributed_worker.py")
CONFIGS = TESTS.parent / "configs" / "accelerate"
needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")
DEEPSPEED = ("zero2", "zero3")
LAUNCHES = ("ddp", "fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in DEEPSPEED))


def launch(name: str, *command: str, processes: int = 2) -> None:
    """Run ``command`` in processes of its own with the settings of the config file ``name``.

    ``accelerate launch`` starts one process where there is no GPU, hence torchrun with the variables that it would set.
    """
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    settings = {key.upper(): str(value) for key, value in values.get("fsdp_config", {}).items()}
    settings |= deepspeed_settings(values.get("deepspeed_config", {}))
    settings |= {"ACCELERATE_USE_FSDP": str("fsdp_config" in values), "OMP_NUM_THREADS": "1"}
    settings["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*torchrun, *command], capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def deepspeed_settings(values: dict) -> dict[str, str]:
    prefixes = ("ACCELERATE" if key.startswith("gradient") else "ACCELERATE_DEEPSPEED" for key in values)
    settings = {f"{prefix}_{key.upper()}": str(value) for prefix, (key, value) in zip(prefixes, values.items())}
    return settings | {"ACCELERATE_USE_DEEPSPEED": str(bool(values)), "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> distributed_worker.Gathered:
    # One process with the optimizer batch of two.
    return distributed_worker.train(tmp_path_factory.mktemp("alone"), per_device_train_batch_size=6)


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_processes_train_as_one(name: str, tmp_path: Path, alone: distributed_worker.Gathered) -> None:
    launch(name, WORKER, str(tmp_path), "per_device_train_batch_size=3")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    assert result["sharded"] == (name in ("fsdp2", "zero3"))
    assert (result["elements"] == 0) == (name == "zero3")
    # Six a parameter and token, though ZeRO-3 leaves parameters no elements.
    assert result["flos"] > 0
    assert result["flos"] % (6 * sum(p.numel() for p in tiny().parameters())) == 0
    residuals = [(a - b) / b for a, b in zip(result["losses"], alone.step_losses, strict=True)]
    assert max(map(abs, residuals)) <= 1e-5
    # Rounding to both sides, no drift to one.
    assert abs(sum(residuals) / len(residuals)) <= 1e-7
    expected = [entry["cross_entropy"] for entry in alone.state.log_history if "cross_entropy" in entry]
    assert result["logs"] == pytest.approx(expected, rel=1e-5)
    found = tiny()
    found.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert_same_weights(found, weights(alone.model), weights(tiny()), 1e-5)


def test_two_processes_halve_when_one_runs_out_of_memory(tmp_path: Path, alone: distributed_worker.Gathered) -> None:
    launch("ddp", WORKER, str(tmp_path), "per_device_train_batch_size=3", "max_tokens=180", "room=120")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["max_tokens"] == 90
    assert result["losses"] == pytest.approx(alone.step_losses, rel=1e-5)
    expected = [entry["cross_entropy"] for entry in alone.state.log_history if "cross_entropy" in entry]
    assert result["logs"] == pytest.approx(expected, rel=1e-5)
    found = tiny()
    found.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert_same_weights(found, weights(alone.model), weights(tiny()), 1e-5)


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_processes_resume(name: str, tmp_path: Path) -> None:
    options = ["per_device_train_batch_size=3", 'save_strategy="steps"', "save_steps=3", 'optim="adamw_torch"']
    launch(name, WORKER, str(tmp_path), *options)
    whole, kept = (tmp_path / file for file in ("result.json", "weights.safetensors"))
    losses, expected = json.loads(whole.read_text())["losses"], load_file(kept)
    launch(name, WORKER, str(tmp_path), *options, f'resume="{tmp_path / "checkpoint-3"}"')
    assert json.loads(whole.read_text())["losses"] == losses[3:]
    assert all(torch.equal(x, expected[key]) for key, x in load_file(kept).items())


@pytest.fixture(scope="module")
def run_alone(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "alone"
    assert main(["train", str(write_config(small_folder, run, training=training(4))), "--quiet"]) == 0
    return run


def training(batch: int, **changes) -> dict:
    defaults = {"per_device_train_batch_size": batch, "use_cpu": True, "learning_rate": 0.05, "optim": "sgd"}
    return defaults | {"max_tokens": 60} | changes


@pytest.mark.parametrize("name", LAUNCHES)
def test_two_processes_run_the_same_stream(name: str, small_folder: Path, tmp_path: Path, run_alone: Path) -> None:
    run = tmp_path / "two"
    launch(name, WORKER, "kpig", "train", str(write_config(small_folder, run, training=training(2))))
    for found, expected in zip(read_run(run), read_run(run_alone), strict=True):
        assert found.evaluation == expected.evaluation
        assert found.gains == pytest.approx(expected.gains, abs=1e-5)
        assert found.replayed == expected.replayed
        if expected.training:
            assert found.training["loss"] == pytest.approx(expected.training["loss"], rel=1e-5)
        answers = [step_folder(one, found.step) / "predictions.jsonl" for one in (run, run_alone)]
        assert answers[0].read_bytes() == answers[1].read_bytes()
    for step in range(3):
        kept = [step_folder(one, step) / "model" / "model.safetensors" for one in (run, run_alone)]
        found, expected = map(load_file, kept)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[key], x, atol=1e-6) for key, x in expected.items())
    AutoModelForCausalLM.from_pretrained(step_folder(run, 2) / "model")
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("strategy", ["kpig", "inscl"])
def test_two_processes_keep_an_adapter_that_lies_in_pieces(strategy: str, small_folder: Path, tmp_path: Path) -> None:
    alone, together = (tmp_path / name for name in ("alone", "together"))
    changes = {"lora": {"r": 2, "lora_alpha": 4}, "strategy": strategy}
    assert main(["train", str(write_config(small_folder, alone, training=training(4), **changes)), "--quiet"]) == 0
    config = write_config(small_folder, together, training=training(2), **changes)
    launch("fsdp2", WORKER, "kpig", "train", str(config), "--quiet")
    for step in range(3):
        kept = [step_folder(run, step) / "model" / "adapter_model.safetensors" for run in (together, alone)]
        found, expected = map(load_file, kept)
        assert found.keys() == expected.keys()
        assert any(x.any() for key, x in expected.items() if "lora_B" in key)
        assert all(torch.allclose(found[key], x, atol=1e-6) for key, x in expected.items())
    assert [step.evaluation for step in read_run(together)] == [step.evaluation for step in read_run(alone)]


@needs_deepspeed
def test_deepspeed_leaves_the_model_to_the_next_engine(tmp_path: Path) -> None:
    launch("zero2", WORKER, str(tmp_path), "per_device_train_batch_size=3")
    assert json.loads((tmp_path / "result.json").read_text())["hooks"] == 0


@needs_deepspeed
@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_deepspeed_run_in_bf16_goes_on_behind_a_step(name: str, small_folder: Path, tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    values = training(2, bf16=True, optim="adamw_torch", learning_rate=3e-3)
    command = [WORKER, "kpig", "train", str(write_config(small_folder, run, training=values))]
    launch(name, *command)
    shutil.copytree(run, undisturbed)
    for step in (1, 2):
        shutil.rmtree(step_folder(run, step))
    launch(name, *command)
    for found, expected in zip(read_run(run), read_run(undisturbed), strict=True):
        assert found.gains == expected.gains
    for step in (1, 2):
        found, expected = (
            load_file(step_folder(one, step) / "model" / "model.safetensors") for one in (run, undisturbed)
        )
        assert all(x.dtype == torch.bfloat16 and torch.equal(x, expected[key]) for key, x in found.items())
