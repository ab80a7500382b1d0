"""Finished runs as the comparison reads them: with their settings and their data."""

from collections.abc import Mapping
from pathlib import Path

from kpig_fast.data.schema import TaskCollection
from kpig_fast.evaluation.rescoring import StoredRun
from kpig_fast.evaluation.runs import CONFIG_FILE
from kpig_fast.training.data import load_data
from kpig_fast.training.run_config import load_run_config


def open_runs(runs: Mapping[str, Path], *, progress: bool = False) -> list[StoredRun]:
    """Read config and data of every run; data that several have in common is read once.

    Args:
        runs: output folders of ``kpig train`` or ``kpig ask``, by the name that tables give them.
        progress: show progress bars while data is read.

    Raises:
        FileNotFoundError: a folder has no ``config.yaml``, or its data is not there any more.
        ValueError: a config or data that cannot be read.
    """
    collections: dict[str, TaskCollection] = {}
    opened = []
    for name, folder in runs.items():
        config = load_run_config(folder / CONFIG_FILE)
        data = config.data.model_dump_json()
        if data not in collections:
            collections[data], _ = load_data(config.data, progress=progress)
        opened.append(StoredRun(name, folder, config.model_dump(mode="json"), collections[data]))
    return opened
