"""A stream of 20 real tasks from its first step to its report, killed twice inside a step and started again.

The run is ``kpig train`` in a process of its own. Each kill is a SIGKILL as soon as the step has a whole checkpoint.
"""

import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from common import SHARED, report
from tqdm import tqdm

from kpig_fast.evaluation.runs import COMPLETE_FILE, StepMetrics, read_run, step_folder


def options() -> ArgumentParser:
    """The options of this benchmark."""
    found = ArgumentParser(description=__doc__)
    found.add_argument("--model", type=Path, default=SHARED / "models" / "stories260K-sni", help="folder of a model")
    found.add_argument(
        "--data", type=Path, default=SHARED / "data" / "sni_core", help="tasks/, manifest.json, pools.jsonl"
    )
    found.add_argument("--steps", type=int, default=20, help="tasks to learn (default: 20)")
    found.add_argument("--rows", type=int, default=200, help="training rows of a task (default: 200)")
    found.add_argument("--kills", type=int, nargs="*", default=[6, 13], help="steps that are killed (default: 6 13)")
    found.add_argument("--limit", type=int, default=10, help="questions of a task (default: 10)")
    found.add_argument("--out", type=Path, help="JSON file for the record of the run")
    return found


def config(arguments: Any, run: Path) -> dict[str, Any]:
    """The config of the run: the paper's M, N, alpha and lambda, and a checkpoint after every optimizer step."""
    held_out = [line for line in (arguments.data / "splits" / "test_tasks.txt").read_text().split() if line]
    seen = [line for line in (arguments.data / "splits" / "train_tasks.txt").read_text().split() if line]
    return {
        "model": str(arguments.model),
        "output_dir": str(run),
        "data": {
            "source": "natural_instructions",
            "path": str(arguments.data / "tasks"),
            "side_files": [str(arguments.data / name) for name in ("manifest.json", "pools.jsonl")],
            "n_train": arguments.rows,
            "seen": seen,
            "held_out": held_out,
        },
        "stream": {"steps": arguments.steps},
        "training": {"learning_rate": 1e-3, "per_device_train_batch_size": 16, "save_steps": 1, "use_cpu": True},
        # A model of 512 positions has no room for demonstrations.
        "evaluation": {"limit": arguments.limit, "max_new_tokens": 16, "demonstrations": 0},
    }


def start(path: Path) -> subprocess.Popen[bytes]:
    """``kpig train`` on a config file."""
    return subprocess.Popen([sys.executable, "-m", "kpig_fast.cli", "train", str(path), "--quiet"])


def has_checkpoint(run: Path, step: int) -> bool:
    """Whether a step that is being trained has a whole checkpoint."""
    return any(step_folder(run, step).glob(f"trainer/checkpoint-*/{COMPLETE_FILE}"))


def go_through(path: Path, run: Path, kills: Sequence[int]) -> float:
    """Run to the end, with a kill in each of ``kills``; seconds from the first start to the last end."""
    started = time.perf_counter()
    for step in tqdm(kills, desc="kills", unit="kill"):
        process = start(path)
        while not has_checkpoint(run, step):
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself before step {step} had a checkpoint")
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if start(path).wait():
        raise SystemExit("the run failed")
    return time.perf_counter() - started


def shares(steps: Sequence[StepMetrics], title: str, minutes: float) -> dict[str, list[float]]:
    """What the benchmark is about, of the steps that were not killed: the others do not know the time before."""
    costs = [step.training for step in steps]
    return {
        f"minutes from start to report: {title}": [minutes],
        "% of the training of a step: plan and pre-pass": [
            100 * (cost["plan_seconds"] + cost["prepass_seconds"]) / cost["train_seconds"] for cost in costs
        ],
    }


def main(command: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``command``: its options, default those of the command line."""
    arguments = options().parse_args(command)
    with TemporaryDirectory() as name:
        run, path = Path(name) / "run", Path(name) / "config.yaml"
        path.write_text(yaml.safe_dump(config(arguments, run)))
        minutes = go_through(path, run, arguments.kills) / 60
        steps = read_run(run)
        assert (run / "report.html").exists()
    trained = [step for step in steps if step.training and step.step not in arguments.kills]
    parts = ("plan_seconds", "prepass_seconds", "train_seconds")
    seconds = {part: [step.training[part] for step in trained] for part in parts}
    figures = {role: vars(steps[-1].scores(role)) for role in ("seen", "held_out")}
    title = f"{arguments.steps} steps, {len(arguments.kills)} of them killed"
    report(arguments, seconds, shares(trained, title, minutes), steps=[step.step for step in trained], scores=figures)


if __name__ == "__main__":
    main()
