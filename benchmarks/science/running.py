"""Runs of an experiment as processes of ``kpig train``, several at a time; what is finished is not run again."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from experiments import Settings
from tqdm import tqdm

from kpig_fast.data.files import write_lines
from kpig_fast.training.run_config import dump_run_config, load_run_config
from kpig_fast.training.stream import MODEL_FOLDER

FINISHED = "finished.json"


@dataclass(frozen=True)
class Job:
    """One run: its output folder, the file of its stream, and what it sets otherwise."""

    folder: Path
    stream: Path
    settings: Settings

    @property
    def config_path(self) -> Path:
        """The file that the run is started with."""
        return self.folder.with_suffix(".yaml")

    @property
    def config(self) -> str:
        """What it holds."""
        return dump_run_config(load_run_config(self.stream, {**self.settings, "output_dir": str(self.folder)}))

    @property
    def finished(self) -> bool:
        """Whether the run has ended well. Raises SystemExit where it is a run of other settings."""
        if not (self.folder / FINISHED).exists():
            return False
        if self.config_path.read_text("utf-8").rstrip("\n") != self.config.rstrip("\n"):
            raise SystemExit(f"{self.folder} is a run of other settings; delete it, or choose another folder by --runs")
        return True


def run_all(jobs: Sequence[Job], processes: int) -> None:
    """Run every job that is not finished, ``processes`` at a time with one thread each.

    A run that was stopped goes on where it was. Only the last model of a finished run is kept. Raises SystemExit naming
    the log of the first run that failed.
    """
    waiting = [job for job in jobs if not job.finished]
    with ThreadPoolExecutor(processes) as pool:
        for _ in tqdm(pool.map(_run, waiting), total=len(waiting), desc="runs", unit="run"):
            pass


def _run(job: Job) -> None:
    log = job.folder.with_suffix(".log")
    write_lines(job.config_path, [job.config.rstrip("\n")])
    started = time.perf_counter()
    command = [sys.executable, "-m", "kpig_fast.cli", "train", str(job.config_path), "--quiet"]
    with log.open("a") as file:
        code = subprocess.call(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if code:
        raise SystemExit(f"a run ended with exit code {code}; see {log}, and start the same command again")
    for model in sorted(job.folder.glob(f"step-*/{MODEL_FOLDER}"))[:-1]:
        shutil.rmtree(model)
    write_lines(job.folder / FINISHED, [json.dumps({"seconds": time.perf_counter() - started})])
