"""A run that is killed at any moment, also while it saves, ends with bitwise the weights of an undisturbed one."""

import multiprocessing
import random
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import TASKS, config_values

from kpig_fast.evaluation.runs import read_run, step_folder
from kpig_fast.training.run_config import RunConfig
from kpig_fast.training.stream import Stream

KILLS = 20

# Saves after every optimizer step, so that most of the time is saving.
TRAINING = {
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "learning_rate": 1e-3,
    "save_steps": 1,
    "logging_steps": 2,
    "num_train_epochs": 2,
}


def run_to_the_end(folder: Path, run: Path) -> None:
    """The whole run, or what is left of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    config = config_values(folder, run, training=TRAINING)
    Stream.open(RunConfig.model_validate(config), progress=False).run()


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(step_folder(run, len(TASKS) - 1) / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks from a process that has imported everything")
def test_killed_at_random_moments(small_folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_stream_killed"])

    def start(run: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run_to_the_end, args=(small_folder, run))
        process.start()
        return process

    undisturbed = tmp_path / "undisturbed"
    start(undisturbed).join()
    started = time.monotonic()
    start(tmp_path / "timed").join()
    whole = time.monotonic() - started
    generator, n_killed, n_ended = random.Random(0), 0, 0
    while n_killed < KILLS or n_ended == 0:
        run = tmp_path / f"run-{n_ended}"
        is_new, started = not run.exists(), time.monotonic()
        process = start(run)
        # Runs that were killed late go on from where they were, so that kills fall all over a run.
        process.join(generator.uniform(0, whole) if n_killed < KILLS else None)
        if process.is_alive():
            process.kill()
            process.join()
            n_killed += 1
            continue
        assert process.exitcode == 0
        assert_same(run, undisturbed)
        n_ended += 1
        # A machine that was busy for a while would have runs end before they are killed.
        whole = min(whole, time.monotonic() - started) if is_new else whole


def assert_same(run: Path, undisturbed: Path) -> None:
    found, expected = final_weights(run), final_weights(undisturbed)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    for one, two in zip(read_run(run), read_run(undisturbed), strict=True):
        assert one.evaluation == two.evaluation
        assert one.gains == two.gains
        assert one.training.get("loss") == two.training.get("loss")
    assert not list(run.rglob("checkpoint-*"))
    assert not list(run.rglob("*.partial"))
