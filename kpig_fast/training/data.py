"""The tasks and rows that a run's ``data`` section names."""

from pathlib import Path

from kpig_fast.data.collection import load_collection
from kpig_fast.data.natural_instructions import load_natural_instructions
from kpig_fast.data.schema import TaskCollection
from kpig_fast.data.suite import bundled_suite
from kpig_fast.data.validation import ValidationReport
from kpig_fast.training.run_config import DataConfig


def load_data(config: DataConfig, *, progress: bool = False) -> tuple[TaskCollection, ValidationReport]:
    """Read the collection, with a report of what was dropped.

    Raises:
        DataError: ``strict``, and something was dropped.
        ValueError: a named task is not there.
        FileNotFoundError: a file is absent.
    """
    if config.source == "suite":
        collection = bundled_suite(n_train=config.n_train or 200).with_roles(config.seen, config.held_out)
        return collection, ValidationReport(kept=len(collection.rows))
    path = Path(config.path or "")
    if config.source == "folder":
        collection, report = load_collection(path, strict=config.strict, progress=progress)
        return collection.with_roles(config.seen, config.held_out), report
    return load_natural_instructions(
        path,
        side_file=list(config.side_files),
        tasks=[*config.seen, *(config.held_out or ())] if config.seen is not None else None,
        n_test=config.n_test,
        n_validation=config.n_validation,
        seen=config.seen,
        held_out=config.held_out,
        strict=config.strict,
        progress=progress,
    )
