"""The evidence whether KPIG listens, one command a table, from the root of the repository:

    python benchmarks/science/science.py select suite        # learning rate, lambda, penalties, by validation rows
    python benchmarks/science/science.py compare suite       # every arm: P, V, gain over the steps, half-listening
    python benchmarks/science/science.py sensitivity suite   # kpig with other lambda, alpha, M, N

and the same with ``real`` for the tasks of Natural Instructions. Runs lie in ``--runs`` and go on where they were
stopped; results go to ``--results``.
"""

import csv
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from experiments import (
    ARMS,
    CHOICES,
    FOLDS,
    HERE,
    OURS,
    SEEDS,
    SELECTION_SEEDS,
    SENSITIVITY,
    SENSITIVITY_SEEDS,
    STREAMS,
    Settings,
)
from running import Job, run_all
from tables import write_comparison, write_sensitivity

from kpig_fast.data.files import write_lines
from kpig_fast.evaluation.runs import read_run
from kpig_fast.training.data import load_data
from kpig_fast.training.run_config import load_run_config

CHOSEN, SELECTION = "chosen.yaml", "selection.csv"


def select(stream: str, runs: Path, results: Path, processes: int, seeds: Sequence[int] = SELECTION_SEEDS) -> None:
    """Choose the values of ``CHOICES`` and write what was chosen, and every figure that led to it."""
    resolved = load_run_config(HERE / f"{stream}.yaml", STREAMS[stream])
    tasks = load_data(resolved.data)[0].names("seen")
    chosen: dict[str, dict[str, Any]] = {}
    rows: list[list[Any]] = []
    for arm, (name, values) in CHOICES.items():
        settings = {**_settings(arm, chosen), "evaluation.split": "validation", "evaluation.half_listening": 0}
        grid = list(product(values, seeds))
        jobs = [
            _job(
                stream,
                runs / "select" / arm / f"{value}" / f"seed-{seed}",
                {**settings, **_fold(tasks, seed), name: value, "seed": seed},
            )
            for value, seed in grid
        ]
        run_all(jobs, processes)
        rows += [[arm, name, value, seed, *_goodness(job)] for (value, seed), job in zip(grid, jobs)]
        means = {value: fmean(row[-1] for row in rows if row[0] == arm and row[2] == value) for value in values}
        chosen["all" if arm == "sft" else arm] = {name: max(means, key=means.__getitem__)}
    header = ["arm", "setting", "value", "seed", "P trained", "V trained", "P withheld", "V withheld", "goodness"]
    with (results / SELECTION).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    write_lines(results / CHOSEN, [yaml.safe_dump(chosen, sort_keys=False).rstrip("\n")])
    print(f"wrote {results / CHOSEN}: {chosen}")


def compare(
    stream: str,
    runs: Path,
    results: Path,
    processes: int,
    seeds: Sequence[int] = SEEDS,
    arms: Sequence[str] = tuple(ARMS),
) -> None:
    """Run every arm with every seed, and write the tables and figures."""
    chosen = _chosen(results)
    jobs = {
        f"{arm}/{seed}": _job(
            stream,
            runs / "compare" / arm.replace(" ", "") / f"seed-{seed}",
            {**_settings(arm, chosen), "seed": seed},
        )
        # All arms of a seed before the next one: a table of fewer seeds is a table.
        for seed, arm in product(seeds, arms)
    }
    run_all(list(jobs.values()), processes)
    write_comparison({name: job.folder for name, job in jobs.items()}, results)


def sensitivity(
    stream: str, runs: Path, results: Path, processes: int, seeds: Sequence[int] = SENSITIVITY_SEEDS
) -> None:
    """Run kpig with one setting changed at a time, and write the table and the figure."""
    settings = _settings(OURS, _chosen(results))
    resolved = load_run_config(HERE / f"{stream}.yaml", {**STREAMS[stream], **settings}).model_dump()
    jobs: dict[str, Job] = {}
    points: dict[str, list[tuple[str, Any]]] = {}
    for seed, setting in product(seeds, SENSITIVITY):
        for value in SENSITIVITY[setting]:
            # kpig as it is lies on the course of every setting, and is run once.
            same = value == reduce(lambda section, name: section[name], setting.split("."), resolved)
            name = f"{OURS}/{seed}" if same else f"{setting}={value}/{seed}"
            jobs[name] = _job(stream, runs / "sensitivity" / name, {**settings, setting: value, "seed": seed})
            points.setdefault(name, []).append((setting, value))
    run_all(list(jobs.values()), processes)
    write_sensitivity({name: job.folder for name, job in jobs.items()}, points, results)


def _job(stream: str, folder: Path, settings: Settings) -> Job:
    return Job(folder, HERE / f"{stream}.yaml", {**STREAMS[stream], **settings})


def _settings(arm: str, chosen: Any) -> dict[str, Any]:
    """What an arm sets: its own, the learning rate of all, and what was chosen for its strategy."""
    return {**ARMS[arm], **chosen.get("all", {}), **chosen.get(ARMS[arm]["strategy"], {})}


def _fold(tasks: Sequence[str], seed: int) -> Settings:
    """Withhold a third of the seen tasks, another third by every seed that follows."""
    withheld = tasks[seed % FOLDS :: FOLDS]
    return {"data.seen": [task for task in tasks if task not in withheld], "data.held_out": withheld}


def _goodness(job: Job) -> list[float]:
    """P and V of the trained and of the withheld tasks after the last step, and the mean of both P - V."""
    last = read_run(job.folder)[-1]
    trained, withheld = last.scores("seen"), last.scores("held_out")
    figures = [trained.p, trained.v, withheld.p, withheld.v]
    p, v, other_p, other_v = (figure for figure in figures if figure is not None)
    return [p, v, other_p, other_v, (p - v + other_p - other_v) / 2]


def _chosen(results: Path) -> Any:
    if not (results / CHOSEN).exists():
        raise SystemExit(f"{results / CHOSEN} is not there; run select first")
    return yaml.safe_load((results / CHOSEN).read_text("utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    tables = {"select": select, "compare": compare, "sensitivity": sensitivity}
    parser.add_argument("table", choices=tables)
    parser.add_argument("stream", choices=STREAMS)
    parser.add_argument("--runs", type=Path, default=Path("runs/science"))
    parser.add_argument("--results", type=Path, default=HERE.parent / "results" / "science")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--arms", choices=ARMS, nargs="+", help="compare: only these, kpig among them")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the table")
    arguments = parser.parse_args(argv)
    results = arguments.results / arguments.stream
    results.mkdir(parents=True, exist_ok=True)
    given = {name: getattr(arguments, name) for name in ("seeds", "arms") if getattr(arguments, name)}
    if "arms" in given and arguments.table != "compare":
        parser.error(f"{arguments.table} has no arms to choose from; leave --arms out")
    tables[arguments.table](arguments.stream, arguments.runs / arguments.stream, results, arguments.processes, **given)


if __name__ == "__main__":
    main()
