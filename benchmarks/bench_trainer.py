"""What of an optimizer step of ``KPIGTrainer`` is not computing: batches, token trees, logs, callbacks.

``python benchmarks/bench_trainer.py --quick``; README.md beside this file says how to read it.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from common import Seconds, Setting, parser, report, require, setting
from torch import nn
from torch.utils.data.dataloader import _BaseDataLoaderIter
from transformers import PrinterCallback, Trainer
from transformers.trainer_callback import CallbackHandler

from kpig_fast import KPIGConfig, KPIGTrainer
from kpig_fast.teacher import Teacher
from kpig_fast.training import batches, trainer
from kpig_fast.training.progress import StepProgress

STEP, REST, OUTSIDE = "step", "everything else", "all that is not computing"
COMPUTING = ("forward and loss", "backward", "gradient clipping", "optimizer", "zeroing gradients")
OVERHEAD = "sampler", "tree building", "collator", "data loader", "teacher's hidden states", "logs and callbacks", REST
WORKERS = {"no worker": 0, "one worker": 1}
# What is timed, as who holds it and its name there. A part that is called inside of another counts for itself only.
CALLS: tuple[tuple[str, Any, str], ...] = (
    ("forward and loss", trainer, "run_tree"),
    ("backward", Accelerator, "backward"),
    ("gradient clipping", Trainer, "_clip_grad_norm"),
    ("optimizer", AcceleratedOptimizer, "step"),
    ("zeroing gradients", nn.Module, "zero_grad"),
    ("sampler", _BaseDataLoaderIter, "_next_index"),
    ("collator", batches.ForestCollator, "__call__"),
    ("tree building", batches, "pack"),
    ("data loader", _BaseDataLoaderIter, "__next__"),
    ("teacher's hidden states", Teacher, "hidden"),
    ("logs and callbacks", KPIGTrainer, "log"),
    ("logs and callbacks", CallbackHandler, "call_event"),
)


class StepClock:
    """Splits time into steps, and every step into parts that add up to it.

    Args:
        now: seconds, of wall time or of processor time.

    Attributes:
        steps: seconds of every part, for each step; what belongs to no part is ``REST``.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.steps: list[dict[str, float]] = []
        self._now, self._part, self._since = now, REST, now()

    def next_step(self) -> None:
        """What follows belongs to another step."""
        self._switch(self._part)
        self.steps.append(dict.fromkeys((*COMPUTING, *OVERHEAD), 0.0))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time counts for ``part``, without that of the timed functions that it calls."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self._switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch(before)

        return run

    def _switch(self, part: str) -> str:
        before, now = self._part, self._now()
        if self.steps:
            self.steps[-1][before] += now - self._since
        self._part, self._since = part, now
        return before


@contextmanager
def timing(clock: StepClock) -> Iterator[None]:
    """Inside, ``clock`` sees the parts of every training; a step begins where its micro-batches are asked for."""

    def asked(*args: Any, **kwargs: Any) -> Any:
        clock.next_step()
        return collect(*args, **kwargs)

    collect = Trainer.get_batch_samples
    with ExitStack() as stack:
        for part, owner, name in CALLS:
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(Trainer, "get_batch_samples", asked))
        yield


def train(s: Setting, folder: Path, clock: StepClock, **arguments: Any) -> list[float]:
    """The losses of training a copy of the model, logged in every step.

    Args:
        s: the model, its tokenizer and the instances.
        folder: where the pre-pass lies, which one training makes and the next one reads.
        clock: sees the steps.
        arguments: of ``KPIGConfig``.
    """
    args = KPIGConfig(
        output_dir=str(folder),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    made = KPIGTrainer(copy.deepcopy(s.model), args, s.instances, s.tokenizer)
    made.remove_callback(PrinterCallback)
    made.add_callback(StepProgress("training"))
    with timing(clock):
        made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def by_part(steps: Sequence[dict[str, float]], where: str) -> tuple[Seconds, dict[str, list[float]]]:
    """Of every step, seconds of each part and of all; and how many per cent of it each part is that computes nothing.

    ``where`` stands in the names of both.
    """
    seconds = {part: [step[part] for step in steps] for part in (*COMPUTING, *OVERHEAD)}
    seconds[STEP] = [sum(step.values()) for step in steps]
    seconds[OUTSIDE] = [all_ - sum(step[part] for part in COMPUTING) for all_, step in zip(seconds[STEP], steps)]
    shares = {
        f"% of a step, {where}: {part}": [100 * a / b for a, b in zip(seconds[part], seconds[STEP])]
        for part in (*OVERHEAD, OUTSIDE)
    }
    return {f"{part}, {where}": values for part, values in seconds.items()}, shares


def main(command: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``command``: its options, default those of the command line."""
    options = parser("What of a training step is not computing.", tasks=12, instances=40)
    options.add_argument("--micro-batch", type=int, default=16, help="instances of a micro-batch (default: 16)")
    options.add_argument("--accumulation", type=int, default=3, help="micro-batches of a step (default: 3)")
    arguments = options.parse_args(command)
    s = setting(arguments)
    now = time.process_time if arguments.processor_time else time.perf_counter
    seconds, shares, losses = {}, {}, []
    with TemporaryDirectory() as folder:
        for where, workers in WORKERS.items():
            clock = StepClock(now)
            found = train(
                s,
                Path(folder),
                clock,
                max_steps=arguments.rounds + 2,
                per_device_train_batch_size=arguments.micro_batch,
                gradient_accumulation_steps=arguments.accumulation,
                dataloader_num_workers=workers,
            )
            losses.append(found)
            # The first step warms up, the last one holds the end of the training.
            of_these = by_part(clock.steps[1:-1], where)
            for of_all, new in zip((seconds, shares), of_these):
                of_all |= new
    require("losses differ by", max(abs(a - b) for a, b in zip(*losses, strict=True)), 1e-6)
    report(arguments, seconds, shares, parameters=s.model.num_parameters())


if __name__ == "__main__":
    main()
