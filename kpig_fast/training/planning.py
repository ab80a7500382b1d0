"""What a run's time steps are, and the plan of each: what it replays, in which wording, and what forgetting costs.

A plan is made with M_{t-1}, the model as it is before its step, written, and from then on read.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Instance, PoolInstruction, Row, TaskCollection, make_instance
from kpig_fast.entropy import predictive_entropies
from kpig_fast.evaluation.runs import PLAN_FILE, step_folder
from kpig_fast.method.replay import Draw, ReplayPlan, assign_instructions, draw
from kpig_fast.processes import gather, is_sharded, rank, share, wait
from kpig_fast.scorer import KeyPartScorer
from kpig_fast.teacher import model_hash
from kpig_fast.training.config import KPIGConfig
from kpig_fast.training.embedding import embed, load_embedder
from kpig_fast.training.penalty import QuadraticPenalty, fisher_information
from kpig_fast.training.run_config import RunConfig
from kpig_fast.training.strategies import STRATEGIES, PlanRequest, Strategy
from kpig_fast.training.trainer import run_prepass

FISHER_FILE = "fisher.safetensors"
TRAINER_FOLDER = "trainer"


def make_steps(collection: TaskCollection, config: RunConfig) -> list[list[str]]:
    """The seen tasks of every time step.

    Raises:
        ValueError: ``stream.order`` names an unknown task or category, or one twice; a task has no training rows.
    """
    seen = collection.names("seen")
    groups: dict[str, list[str]] = {}
    for name in seen:
        groups.setdefault(name if config.stream.by == "task" else collection.tasks[name].category, []).append(name)
    order = list(config.stream.order or groups)
    unknown = [name for name in order if name not in groups]
    if unknown:
        raise ValueError(
            f"stream.order names {unknown[0]!r}, which is no {config.stream.by} to train; known: {', '.join(groups)}"
        )
    if len(set(order)) < len(order):
        raise ValueError("stream.order names a step twice; a task is learnt once")
    if config.stream.order is None:
        random.Random(config.seed).shuffle(order)
    steps = [groups[name] for name in order[: config.stream.steps]]
    empty = [name for step in steps for name in step if not collection.of_task(name, "train")]
    if empty:
        raise ValueError(f"task {empty[0]!r} is in the stream but has no training rows; add rows or leave it out")
    return [[name for step in steps for name in step]] if STRATEGIES[config.strategy].joint else steps


def check_launch(config: RunConfig, model: nn.Module) -> None:
    """Check that the strategy works where the model lies; ValueError where it does not."""
    if is_sharded(model) and STRATEGIES[config.strategy].penalty == "fisher":
        raise ValueError(
            f"strategy {config.strategy!r} needs whole gradients, which FSDP does not keep; launch with DDP"
        )


def chosen_strategy(config: RunConfig) -> Strategy:
    """The strategy that the config names, without the parts that it takes away."""
    strategy = STRATEGIES[config.strategy]
    if "masks" in config.ablate:
        strategy = replace(strategy, plan=STRATEGIES["entropy"].plan)
    return replace(strategy, distils=strategy.distils and "divergence" not in config.ablate)


def training_arguments(config: RunConfig, folder: Path, step: int) -> KPIGConfig:
    """The Trainer's arguments for one step, which writes to ``folder``."""
    defaults = {"report_to": "none", "save_total_limit": 2, "dataloader_pin_memory": torch.cuda.is_available()}
    given: dict[str, Any] = {**defaults, **config.training}
    if given["save_total_limit"] == 1:
        raise ValueError(
            "training.save_total_limit is 1: the last whole checkpoint would be deleted before the next one is whole; "
            "give 2 or more"
        )
    if not chosen_strategy(config).distils:
        given["lam"] = 0.0
    if "temperature" in config.ablate:
        given["fixed_temperature"] = 1.0
    return KPIGConfig(output_dir=str(folder), seed=config.seed + step, disable_tqdm=True, **given)


@dataclass
class Planner:
    """Plans the steps of one run.

    Args:
        config: the whole run.
        collection: tasks and rows.
        steps: task names of every step.
        scorer: measures with the model as it is now.
        tokenizer: the model's.
        progress: show progress bars.
    """

    config: RunConfig
    collection: TaskCollection
    steps: list[list[str]]
    scorer: KeyPartScorer
    tokenizer: PreTrainedTokenizerBase
    progress: bool = True

    @property
    def strategy(self) -> Strategy:
        """What the config asks for."""
        return chosen_strategy(self.config)

    def plan(self, step: int) -> ReplayPlan:
        """The plan of a step: read where it was written, else made with M_{t-1} and written."""
        path = step_folder(self.config.output_dir, step) / PLAN_FILE
        is_written = path.exists()
        # All processes have looked before one writes.
        wait()
        if is_written:
            return ReplayPlan.from_json(path.read_text("utf-8"))
        plan = self._make_plan(step)
        if rank() == 0:
            write_lines(path, [plan.to_json().rstrip("\n")])
        wait()
        return plan

    def _make_plan(self, step: int) -> ReplayPlan:
        settings = self.config.replay
        request = PlanRequest(
            step=step,
            seed=self.config.seed,
            alpha=self.scorer.alpha,
            n_replay_tasks=settings.tasks,
            n_per_task=settings.instances,
            model_hash=model_hash(self.scorer.model),
            earlier=tuple(name for names in self.steps[:step] for name in names),
            new=tuple(self.steps[step]),
            pool=self._pool,
            draw=lambda task, n: self._draw(task, step, n),
            gains=lambda drawn: self._gains(step, [self._instance(one) for one in drawn]),
            entropies=lambda drawn: self._entropies([self._instance(one) for one in drawn]),
            embed=self._embed,
        )
        return self.strategy.plan(request)

    def instances(self, step: int, plan: ReplayPlan) -> list[Instance]:
        """What a step trains: the rows of its tasks, each with a random wording, and what the plan replays."""
        instances = []
        for name in self.steps[step]:
            ids = list(self._rows[name])
            wordings = assign_instructions(name, ids, len(self._pool(name)), seed=self.config.seed, step=step)
            instances += [self._instance(Draw(name, row, wording)) for row, wording in zip(ids, wordings)]
        return instances + [self._instance(one) for one in plan.replayed]

    def planned(self, plan: ReplayPlan) -> list[Instance]:
        """What the gains of a plan were measured on; the pre-pass of its step need not go through it again."""
        return [self._instance(one) for one in plan.drawn] if plan.gains else []

    def validation(self, step: int) -> list[Instance]:
        """The validation rows of a step's tasks, with the first wording.

        Raises:
            ValueError: there are none.
        """
        rows = [row for name in self.steps[step] for row in self.collection.of_task(name, "validation")]
        if not rows:
            raise ValueError(
                f"training.eval_strategy asks for validation rows, but {', '.join(self.steps[step])} has none; "
                "add rows with split validation, or remove it"
            )
        return [make_instance(self.collection.tasks[row.task], row) for row in rows]

    def gains(self, instances: Sequence[Instance]) -> list[float]:
        """Information gain of every instance with the model as it is now; several processes share the work."""
        scores = self.scorer.score(share(instances), progress=self.progress and bool(instances))
        return gather(scores.gain.tolist())

    def _gains(self, step: int, instances: Sequence[Instance]) -> list[float]:
        args = training_arguments(self.config, step_folder(self.config.output_dir, step) / TRAINER_FOLDER, step)
        if not instances or args.lam == 0:
            return self.gains(instances)
        # What is replayed needs its hidden states, too.
        pairs = self.scorer.encoder.encode_all(instances)
        return run_prepass(args, self.scorer, pairs, progress=self.progress).gain.tolist()

    def penalty(self, step: int) -> QuadraticPenalty | None:
        """What leaving M_{t-1} costs; the first step has nothing to forget."""
        kind = self.strategy.penalty
        if kind is None or step == 0:
            return None
        importance = self._fisher(step) if kind == "fisher" else None
        return QuadraticPenalty(self.scorer.model, self.config.penalty.strength, importance)

    def _fisher(self, step: int) -> dict[str, Tensor]:
        """The Fisher information of all steps before, read where it was written."""
        path = step_folder(self.config.output_dir, step) / FISHER_FILE
        if not path.exists():
            earlier = self.instances(step - 1, self.plan(step - 1))
            sample = random.Random(self.config.seed + step).sample(
                earlier, min(len(earlier), self.config.penalty.instances)
            )
            pairs = self.scorer.encoder.encode_all(sample)
            total = fisher_information(
                self.scorer.model, pairs, max_tokens=self.scorer.max_tokens, progress=self.progress
            )
            before = load_file(step_folder(self.config.output_dir, step - 1) / FISHER_FILE) if step > 1 else {}
            for name, x in before.items():
                total[name] += x.to(total[name].device)
            partial = path.with_name(f"{FISHER_FILE}.partial")
            save_file({name: x.contiguous() for name, x in total.items()}, partial)
            partial.replace(path)
        return load_file(path)

    def _pool(self, task: str) -> Sequence[PoolInstruction]:
        return self.collection.tasks[task].instructions[: 1 if "diversity" in self.config.ablate else None]

    def _draw(self, task: str, step: int, n: int | None) -> list[Draw]:
        ids = list(self._rows[task])
        n = len(ids) if n is None else n
        return draw(task, ids, len(self._pool(task)), n=n, seed=self.config.seed, step=step)

    def _instance(self, one: Draw) -> Instance:
        row = self._rows[one.task][one.row_id]
        instance = make_instance(self.collection.tasks[one.task], row, one.instruction)
        return replace(instance, key_parts=()) if "masks" in self.config.ablate else instance

    @cached_property
    def _rows(self) -> dict[str, dict[str, Row]]:
        """The training rows of every task by id, at most ``data.n_train`` of each."""
        names = [name for step in self.steps for name in step]
        rows = {name: self.collection.of_task(name, "train")[: self.config.data.n_train] for name in names}
        return {name: {row.id: row for row in of_task} for name, of_task in rows.items()}

    def _entropies(self, instances: Sequence[Instance]) -> list[float]:
        pairs = self.scorer.encoder.encode_all(share(instances))
        return gather(predictive_entropies(self.scorer, pairs, progress=self.progress and bool(pairs)))

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        name = self.config.inscl.embedder
        return embed(texts, *((self.scorer.model, self.tokenizer) if name is None else load_embedder(name)))
