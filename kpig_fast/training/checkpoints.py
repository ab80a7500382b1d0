"""Checkpoints inside a time step: marked when they are whole, and the newest whole one found after a crash.

The Trainer writes ``checkpoint-N`` file by file, so that a killed process leaves half of one behind.
"""

import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kpig_fast.evaluation.runs import is_complete, mark_complete
from kpig_fast.processes import wait


class StepKeeper(TrainerCallback):
    """Marks every checkpoint behind its last file, and leaves out the one at the end, where the model itself is kept.

    Losses are logged before they are left: at the end, and at each checkpoint, which does not hold those of the steps
    since the last log. So the log of a run that went on from one is that of an undisturbed run.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ends = state.global_step >= state.max_steps or control.should_training_stop
        # The best of all checkpoints may be this one.
        control.should_save = control.should_save and (not ends or bool(args.load_best_model_at_end))
        control.should_log = control.should_log or control.should_save or ends

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Every process has written its part.
        wait()
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def newest_checkpoint(trainer_folder: Path) -> Path | None:
    """The checkpoint of most steps that is whole; those that are not are deleted, with a warning that names them."""
    whole = []
    for folder in trainer_folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if is_complete(folder):
            whole.append(folder)
        else:
            warnings.warn(f"{folder} was not written to its end and is deleted", stacklevel=2)
            shutil.rmtree(folder)
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def delete_checkpoints(trainer_folder: Path) -> None:
    """Delete every checkpoint, when its step is over."""
    for folder in trainer_folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(folder)


def mean_loss(log_history: Iterable[Mapping[str, float]]) -> float:
    """Mean loss of all optimizer steps that a Trainer has logged; NaN without any."""
    total, last = 0.0, 0.0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else float("nan")
