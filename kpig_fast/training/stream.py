"""The continual run: time steps one after another, each planned, trained, evaluated and kept.

Every step has a folder: ``plan.json`` (all that it decided), ``trainer/`` (the Trainer's checkpoints and the teacher),
``log.jsonl``, ``training.json``, ``model/``, ``predictions.jsonl``, ``metrics.json`` and, last, ``COMPLETE``. A run
that was stopped goes on behind its last complete step, inside the next one from the newest whole checkpoint, or with
the evaluation where the model was kept already; a plan that was written is read again, never made again.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from kpig_fast.data.base_model import resolve_model
from kpig_fast.data.files import write_lines
from kpig_fast.data.lengths import check_collection_lengths
from kpig_fast.data.schema import TaskCollection, make_instance
from kpig_fast.environment import environment
from kpig_fast.evaluation.evaluate import check_questions, evaluate
from kpig_fast.evaluation.half_listening import Obedience, check_changed_questions, half_listening
from kpig_fast.evaluation.runs import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    HALF_LISTENING_FILE,
    PREDICTIONS_FILE,
    UNTRAINED,
    StepMetrics,
    is_complete,
    mark_complete,
    step_folder,
    write_metrics,
)
from kpig_fast.method.replay import ReplayPlan
from kpig_fast.processes import main_first, rank, wait
from kpig_fast.training.checkpoints import StepKeeper, delete_checkpoints, mean_loss, newest_checkpoint
from kpig_fast.training.data import load_data
from kpig_fast.training.model_card import write_model_card
from kpig_fast.training.placement import is_partitioned, load_again, load_model, save_model
from kpig_fast.training.planning import TRAINER_FOLDER, Planner, check_launch, make_steps, training_arguments
from kpig_fast.training.progress import StepProgress
from kpig_fast.training.run_config import RunConfig, dump_run_config
from kpig_fast.training.trainer import TEACHER_FOLDER, KPIGTrainer, make_scorer
from kpig_fast.tree.model import position_limit

DATA_REPORT_FILE, DATA_HASH_FILE = "data_report.txt", "data.sha256"
LOG_FILE, TRAINING_FILE = "log.jsonl", "training.json"
MODEL_FOLDER = "model"


def _nothing(_: Path) -> None:
    pass


@dataclass
class Stream:
    """One run. ``run`` goes through the steps; everything else is a part of one.

    Args:
        config: the whole run.
        collection: tasks and rows.
        model, tokenizer: the model as it is now, M_{t-1} before step t.
        planner: the steps, and what each trains.
        after_step: called with the run's folder whenever a step is complete, such as to write a report.
        progress: show progress bars and print one line a step.
    """

    config: RunConfig
    collection: TaskCollection
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    planner: Planner
    after_step: Callable[[Path], object] = _nothing
    progress: bool = True

    @classmethod
    def open(
        cls, config: RunConfig, *, after_step: Callable[[Path], object] = _nothing, progress: bool = True
    ) -> "Stream":
        """Check everything that can be checked before training, and load the model of the last complete step.

        Raises:
            ValueError: the output folder belongs to another config, the data is bad, or the stream names what is not
                there.
        """
        run = config.output_dir
        # These join the processes of the launch.
        arguments = training_arguments(config, run, 0)
        progress = progress and rank() == 0
        resolved = dump_run_config(config)
        check_unchanged(run / CONFIG_FILE, resolved, "config")
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.model))
        collection, report = load_data(config.data, progress=progress)
        steps = make_steps(collection, config)
        kept = [folder for i in range(len(steps)) if (folder := step_folder(run, i) / MODEL_FOLDER).exists()]
        model = load_model(config, kept[-1] if kept else None, arguments)
        check_launch(config, model)
        scorer = make_scorer(model, tokenizer, arguments)
        limit = position_limit(model)
        if limit is not None:
            collection = check_collection_lengths(
                collection, scorer.encoder, limit, report, strict=config.data.strict, progress=progress
            )
        settings = config.evaluation
        check_questions(
            model,
            collection,
            encoder=scorer.encoder,
            tasks=[name for names in steps for name in names] + collection.names("held_out"),
            split=settings.split,
            limit=settings.limit,
            max_new_tokens=settings.max_new_tokens,
            demonstrations=settings.demonstrations,
        )
        check_changed_questions(
            model,
            collection,
            encoder=scorer.encoder,
            tasks=[name for names in steps for name in names],
            split=settings.split,
            limit=settings.half_listening,
            max_new_tokens=settings.max_new_tokens,
        )
        planner = Planner(config, collection, steps, scorer, tokenizer, progress)
        if arguments.eval_strategy != "no":
            for step in range(len(steps)):
                planner.validation(step)
        hashed = data_hash(collection, steps)
        check_unchanged(run / DATA_HASH_FILE, hashed, "data")
        # Only now is the folder this run's: what was wrong above can be mended.
        wait()
        if rank() == 0:
            write_lines(run / CONFIG_FILE, [resolved.rstrip("\n")])
            write_lines(run / DATA_HASH_FILE, [hashed])
            write_lines(run / ENVIRONMENT_FILE, [json.dumps(environment(), indent=2)])
            write_lines(run / DATA_REPORT_FILE, [str(report)])
        stream = cls(config, collection, model, tokenizer, planner, after_step, progress)
        stream.say(str(report))
        return stream

    @property
    def steps(self) -> list[list[str]]:
        """Task names of every step."""
        return self.planner.steps

    def run(self) -> None:
        """Evaluate the untrained model, then take every step that is not complete."""
        untrained = step_folder(self.config.output_dir, UNTRAINED)
        if self.config.evaluation.untrained and not is_complete(untrained) and not self._n_complete():
            self._evaluate(UNTRAINED, [], {})
        for step in tqdm(range(self._n_complete(), len(self.steps)), desc="steps", disable=not self.progress):
            self.take_step(step)

    def take_step(self, step: int) -> None:
        """Plan, train, evaluate and keep one time step; what of it was kept before a crash is not done again."""
        folder = step_folder(self.config.output_dir, step)
        set_seed(self.config.seed + step)
        started = time.perf_counter()
        plan = self.planner.plan(step)
        # Else this run was opened with the model that the step has kept.
        if not (folder / MODEL_FOLDER).exists():
            self._train(step, plan, time.perf_counter() - started)
            if is_partitioned(self.model):
                args = training_arguments(self.config, folder, step)
                kept = folder / MODEL_FOLDER
                self.model = self.planner.scorer.model = load_again(self.model, self.config, kept, args)
        if rank() == 0:
            # Also where a crash came between keeping the model and this.
            shutil.rmtree(folder / TRAINER_FOLDER / TEACHER_FOLDER, ignore_errors=True)
            delete_checkpoints(folder / TRAINER_FOLDER)
        self._evaluate(step, list(plan.chosen), json.loads((folder / TRAINING_FILE).read_text("utf-8")))

    def _train(self, step: int, plan: ReplayPlan, plan_seconds: float) -> None:
        """Train one time step from its newest checkpoint, and keep the model."""
        started = time.perf_counter()
        folder = step_folder(self.config.output_dir, step)
        trainer = self._trainer(step, plan)
        with main_first():
            checkpoint = newest_checkpoint(folder / TRAINER_FOLDER)
        if checkpoint is not None:
            self.say(f"step {step + 1}/{len(self.steps)} goes on from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        end_tracking(trainer.args.report_to or ())
        seconds = time.perf_counter() - started
        training = {
            "loss": mean_loss(trainer.state.log_history),
            "instances": len(trainer.pairs),
            "replayed_instances": len(plan.replayed),
            "scored_for_plan": len(plan.drawn),
            "optimizer_steps": trainer.state.global_step,
            "plan_seconds": plan_seconds,
            "prepass_seconds": trainer.prepass_seconds,
            "train_seconds": seconds - trainer.prepass_seconds,
            "seconds": plan_seconds + seconds,
        }
        if trainer.teacher is not None:
            training["mean_gain"] = float(trainer.teacher.gain.mean())
        partial = folder / f"{MODEL_FOLDER}.partial"
        save_model(self.model, trainer, partial)
        if rank() == 0:
            write_lines(folder / LOG_FILE, (json.dumps(entry) for entry in trainer.state.log_history))
            write_lines(folder / TRAINING_FILE, [json.dumps(training, indent=1)])
            # Last: where it lies, training is not done again.
            partial.rename(folder / MODEL_FOLDER)
        wait()

    def _trainer(self, step: int, plan: ReplayPlan) -> KPIGTrainer:
        args = training_arguments(self.config, step_folder(self.config.output_dir, step) / TRAINER_FOLDER, step)
        trainer = KPIGTrainer(
            self.model,
            args,
            self.planner.instances(step, plan),
            self.tokenizer,
            eval_dataset=None if args.eval_strategy == "no" else self.planner.validation(step),
            planned=self.planner.planned(plan),
            progress=self.progress,
        )
        trainer.penalty = self.planner.penalty(step)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StepKeeper())
        if self.progress:
            trainer.add_callback(StepProgress(f"step {step + 1}/{len(self.steps)}"))
        return trainer

    def say(self, line: str) -> None:
        """Print a line above the progress bars."""
        if self.progress:
            tqdm.write(line)

    def _evaluate(self, step: int, replayed: list[str], training: dict[str, float]) -> None:
        run, settings = self.config.output_dir, self.config.evaluation
        folder = step_folder(run, step)
        learnt = self.steps if step == UNTRAINED else self.steps[: step + 1]
        tasks = [name for names in learnt for name in names] + self.collection.names("held_out")
        result = evaluate(
            self.model,
            self.tokenizer,
            self.collection,
            tasks=tasks,
            limit=settings.limit,
            demonstrations=settings.demonstrations,
            **self._asking(),
            predictions_path=folder / PREDICTIONS_FILE if rank() == 0 else None,
        )
        metrics = StepMetrics(
            step=step,
            strategy=self.config.strategy,
            tasks=() if step == UNTRAINED else tuple(self.steps[step]),
            replayed=tuple(replayed),
            evaluation=result,
            gains=self._mean_gains(tasks),
            training=training,
            obedience=self._half_listening(folder, [name for names in learnt for name in names]),
        )
        if rank() == 0:
            if step != UNTRAINED:
                args = training_arguments(self.config, folder, step)
                write_model_card(folder / MODEL_FOLDER, self.config, args, self.steps[: step + 1], metrics)
            write_metrics(run, metrics)
            mark_complete(folder)
            self.after_step(run)
        wait()
        self.say(_line(metrics, len(self.steps)))

    def _half_listening(self, folder: Path, tasks: Sequence[str]) -> tuple[Obedience, ...]:
        path = folder / HALF_LISTENING_FILE if rank() == 0 else None
        limit = self.config.evaluation.half_listening
        options = {"tasks": tasks, "limit": limit, "predictions_path": path, **self._asking()}
        return tuple(half_listening(self.model, self.tokenizer, self.collection, **options))

    def _asking(self) -> dict[str, Any]:
        """What all questions of this run are asked with."""
        settings = self.config.evaluation
        return {
            "encoder": self.planner.scorer.encoder,
            "split": settings.split,
            "max_new_tokens": settings.max_new_tokens,
            "progress": self.progress,
        }

    def _mean_gains(self, tasks: Sequence[str]) -> dict[str, float]:
        settings = self.config.evaluation
        asked = [row for name in tasks for row in self.collection.of_task(name, settings.split)[: settings.gain_rows]]
        gains = self.planner.gains([make_instance(self.collection.tasks[row.task], row) for row in asked])
        by_task: dict[str, list[float]] = {}
        for row, gain in zip(asked, gains):
            by_task.setdefault(row.task, []).append(gain)
        return {task: sum(values) / len(values) for task, values in by_task.items()}

    def _n_complete(self) -> int:
        return sum(is_complete(step_folder(self.config.output_dir, i)) for i in range(len(self.steps)))


def end_tracking(trackers: Iterable[str]) -> None:
    """End the experiments that ``trackers`` keep open, because the next time step counts from 0 again."""
    for name in {"wandb", "trackio"}.intersection(trackers):
        sys.modules[name].finish()


def check_unchanged(path: Path, expected: str, what: str) -> None:
    """Check that the run that lies where a new one shall go is the same one.

    Args:
        path: file of that run, which need not be there.
        expected: what it holds if the run is the same, but for an end of line.
        what: ``config`` or ``data``.

    Raises:
        ValueError: it holds something else.
    """
    if path.exists() and path.read_text("utf-8").rstrip("\n") != expected.rstrip("\n"):
        raise ValueError(
            f"{path.parent} holds a run with other {what} ({path}); restore it, or choose another output_dir"
        )


def data_hash(collection: TaskCollection, steps: Sequence[Sequence[str]]) -> str:
    """Hexadecimal SHA-256 of the steps and of every task and row."""
    digest = hashlib.sha256(json.dumps([list(step) for step in steps]).encode())
    for part in (*collection.tasks.values(), *collection.rows):
        digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()


def _line(metrics: StepMetrics, n_steps: int) -> str:
    def figure(value: float | None, digits: int = 1) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    scores = "   ".join(
        f"{role} P {figure(metrics.evaluation.p_score(role))} V {figure(metrics.evaluation.v_score(role))} "
        f"gain {figure(metrics.gain(role), 3)}"
        for role in ("seen", "held_out")
    )
    if metrics.step == UNTRAINED:
        return f"untrained: {scores}"
    training = metrics.training
    cost = (
        f"loss {training['loss']:.3f}, {training['instances']:.0f} instances in {training['seconds']:.1f} s, of them "
        f"planning {training['plan_seconds']:.1f} s ({training['scored_for_plan']:.0f} instances of earlier tasks), "
        f"pre-pass {training['prepass_seconds']:.1f} s"
    )
    name = metrics.tasks[0] if len(metrics.tasks) == 1 else f"{len(metrics.tasks)} tasks"
    return f"step {metrics.step + 1}/{n_steps} {name}: {cost}   {scores}"
