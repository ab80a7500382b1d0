"""What planning a time step costs, for up to 80 earlier tasks, and the pre-pass, beside training the step.

``python benchmarks/bench_planning.py --quick``; README.md beside this file says how to read it.
"""

import copy
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory

import torch
from common import ANSWER_SPREAD, SHARED, Contestant, Seconds, make_model, parser, race, ratios, report, require
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from kpig_fast import KeyPartScorer, KPIGTrainer
from kpig_fast.data.files import read_rows
from kpig_fast.data.lengths import check_collection_lengths
from kpig_fast.data.natural_instructions import load_natural_instructions
from kpig_fast.data.schema import PoolInstruction, Row, Task, TaskCollection
from kpig_fast.data.validation import ValidationReport
from kpig_fast.evaluation.runs import step_folder
from kpig_fast.method.replay import ReplayPlan
from kpig_fast.training.planning import TRAINER_FOLDER, Planner, training_arguments
from kpig_fast.training.run_config import DataConfig, ReplayConfig, RunConfig
from kpig_fast.tree.model import position_limit

# The same earlier tasks are planned for in one plan, and in so many plans for equal parts of them: so an earlier task
# costs what it costs, whatever its length.
CUTS = 1, 2, 4, 8
# How many rows of an earlier task there are to draw from, for each that is drawn.
ROWS_PER_DRAW = 2
PREPASS, STEP = "the pre-pass alone", "pre-pass and training"


@dataclass(frozen=True)
class Planning:
    """What is planned for and trained.

    Args:
        model, tokenizer: M_{t-1} and its tokenizer.
        scorer: measures with the model.
        collection: the earlier tasks and the new one.
        earlier: names of the earlier tasks.
        new: name of the new one.
        per_task: instances drawn of each earlier task.
        batch: instances of an optimizer batch.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scorer: KeyPartScorer
    collection: TaskCollection
    earlier: list[str]
    new: str
    per_task: int
    batch: int

    @property
    def sizes(self) -> list[int]:
        """For how many earlier tasks a plan is made: for all of them, and for equal parts."""
        return [len(self.earlier) // cut for cut in CUTS]

    def planner(self, folder: Path, earlier: list[str]) -> Planner:
        """A planner in an empty folder that has taken the step of the ``earlier`` tasks, and comes to the new one."""
        config = RunConfig(
            model="",
            output_dir=folder,
            replay=ReplayConfig(instances=self.per_task),
            training={"per_device_train_batch_size": self.batch, "save_strategy": "no", "use_cpu": True},
        )
        planner = Planner(config, self.collection, [earlier, [self.new]], self.scorer, self.tokenizer, progress=False)
        # Looks up the rows of all tasks, once a run.
        planner.instances(0, planner.plan(0))
        return planner

    def plans(self, folder: Path, size: int) -> Callable[[], list[ReplayPlan]]:
        """Makes the plans for all earlier tasks, ``size`` of them at a time."""
        rmtree(folder, ignore_errors=True)
        parts = [self.earlier[start : start + size] for start in range(0, len(self.earlier), size)]
        planners = [self.planner(folder / str(i), part) for i, part in enumerate(parts)]
        return lambda: [planner.plan(1) for planner in planners]

    def trainer(self, folder: Path) -> KPIGTrainer:
        """A silent trainer of a copy of the model on the new task and on what a plan for all earlier ones replays."""
        rmtree(folder, ignore_errors=True)
        planner = self.planner(folder, self.earlier)
        plan = planner.plan(1)
        args = training_arguments(planner.config, step_folder(folder, 1) / TRAINER_FOLDER, 1)
        instances, planned = planner.instances(1, plan), planner.planned(plan)
        made = KPIGTrainer(copy.deepcopy(self.model), args, instances, self.tokenizer, planned=planned)
        made.remove_callback(PrinterCallback)
        return made


def options() -> ArgumentParser:
    """The options of this benchmark."""
    found = parser("Planning a time step, and its pre-pass, beside training it.", tasks=80, instances=10)
    found.add_argument("--model", type=Path, help="folder of a pretrained model in place of a random one")
    found.add_argument("--more", type=Path, default=SHARED / "data/sni_pool", help="tasks without key parts")
    found.add_argument("--rows", type=int, default=200, help="training rows of the new task (default: 200)")
    found.add_argument("--train-batch", type=int, default=48, help="instances of an optimizer batch (default: 48)")
    return found


def planning(arguments: Namespace) -> Planning:
    """What ``arguments`` ask for; torch gets its number of threads, too.

    Raises:
        ValueError: too few tasks have enough rows that fit into the model's positions, or the earlier tasks cannot be
            cut into equal parts.
    """
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model or arguments.tokenizer)
    collection, new = tasks(arguments)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        model = make_model(tokenizer, arguments.hidden, arguments.layers)
        answers = tokenizer([f" {row.outputs[0]}" for row in collection.rows])["input_ids"]
        model.lm_head.weight.data[sorted({token for answer in answers for token in answer})] *= ANSWER_SPREAD
    scorer = KeyPartScorer(model, tokenizer)
    if limit := position_limit(model):
        collection = check_collection_lengths(collection, scorer.encoder, limit, ValidationReport())
    long = [name for name in collection.tasks if len(collection.of_task(name)) >= arguments.instances]
    earlier = [name for name in long if name != new]
    if arguments.tasks % CUTS[-1] or len(earlier) < arguments.tasks:
        raise ValueError(
            f"--tasks is {arguments.tasks}; give a multiple of {CUTS[-1]} that is at most {len(earlier)}, how many "
            "tasks have enough rows that fit into the model"
        )
    return Planning(
        model=model,
        tokenizer=tokenizer,
        scorer=scorer,
        collection=collection,
        earlier=earlier[: arguments.tasks],
        new=new,
        per_task=arguments.instances,
        batch=arguments.train_batch,
    )


def tasks(arguments: Namespace) -> tuple[TaskCollection, str]:
    """Enough tasks, those with key parts first, and the name of the one that is new."""
    side_file = arguments.data / "manifest.json"
    marked, _ = load_natural_instructions(arguments.data / "tasks", side_file=side_file, n_test=DataConfig().n_test)
    *earlier, new = marked.names("seen")
    n_rows = ROWS_PER_DRAW * arguments.instances
    # Twice as many as are missing: some are too long for a small model.
    missing = max(arguments.tasks - len(earlier), 0)
    more = unmarked_tasks(arguments.more, 2 * missing, n_rows) if missing else TaskCollection()
    rows = [row for name in earlier for row in marked.of_task(name, "train")[:n_rows]]
    rows += marked.of_task(new, "train")[: arguments.rows]
    chosen = {name: marked.tasks[name] for name in (*earlier, new)}
    return TaskCollection.of([*chosen.values(), *more.tasks.values()], [*rows, *more.rows]), new


def unmarked_tasks(folder: Path, n_tasks: int, n_rows: int) -> TaskCollection:
    """The first tasks of a folder without key parts; the first clause of a definition stands in for them.

    Args:
        folder: holds ``tasks.json.gz`` (task, definition) and ``train.jsonl.gz`` (task, id, input, output).
        n_tasks: how many tasks at most.
        n_rows: how many rows of each at most.
    """
    report = ValidationReport()
    described = [fields for _, fields in islice(read_rows(folder / "tasks.json.gz", report), n_tasks)]
    rows: dict[str, list[Row]] = {fields["task"]: [] for fields in described}
    for _, fields in read_rows(folder / "train.jsonl.gz", report):
        name = fields["task"]
        if name in rows and len(rows[name]) < n_rows:
            outputs = tuple(fields["output"])
            rows[name].append(Row(task=name, id=fields["id"], context=fields["input"], outputs=outputs))
    report.require_clean()
    marked = [_marked(fields["task"], fields["definition"]) for fields in described]
    return TaskCollection.of(marked, [row for of_task in rows.values() for row in of_task])


def _marked(name: str, definition: str) -> Task:
    clause = re.split("[.,:;]", definition, maxsplit=1)[0]
    return Task(task=name, instructions=(PoolInstruction(text=definition, key_parts=(clause,)),))


def check(one: ReplayPlan, several: Sequence[ReplayPlan]) -> None:
    """Require that the plans for parts of the earlier tasks find the mean gains that one plan for all finds."""
    found = {task: gain for plan in several for task, gain in plan.mean_gains.items()}
    require("mean gains differ by", max(abs(found[task] - gain) for task, gain in one.mean_gains.items()), 1e-5)


def named(size: int) -> str:
    """How the tables call the planning of so many tasks at a time."""
    return f"{size} earlier tasks"


def shares(seconds: Seconds, sizes: Sequence[int]) -> dict[str, list[float]]:
    """What the benchmark is about, one a round; ``sizes`` come from the largest, for which there is one plan."""
    found = {
        f"an earlier task among {size}: the time of one among {sizes[0]}": ratios(seconds, named(size), named(sizes[0]))
        for size in sizes[1:]
    }
    for size in sizes:
        # Seconds of one plan for so many.
        plan = [size / sizes[0] * value for value in seconds[named(size)]]
        rounds = list(zip(plan, seconds[PREPASS], seconds[STEP]))
        what = f"pre-pass and plan for {named(size)}"
        found[f"% of the training alone: {what}"] = [100 * (a + b) / (c - b) for a, b, c in rounds]
        found[f"% of the whole step: {what}"] = [100 * (a + b) / (a + c) for a, b, c in rounds]
    return found


def main(command: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``command``: its options, default those of the command line."""
    arguments = options().parse_args(command)
    p = planning(arguments)
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        made = {size: p.plans(folder, size)() for size in tqdm(p.sizes, desc="checking", unit="size")}
        (plan,) = made[p.sizes[0]]
        for several in made.values():
            check(plan, several)
        runs: dict[str, Contestant] = {named(size): partial(p.plans, folder, size) for size in p.sizes}
        runs[PREPASS] = lambda: p.trainer(folder).prepare_teacher
        runs[STEP] = lambda: p.trainer(folder).train
        seconds = race(runs, arguments.rounds, processor_time=arguments.processor_time)
    facts = {
        "model": arguments.model.name if arguments.model else "random",
        "parameters": p.model.num_parameters(),
        "instances": {"new": len(p.collection.of_task(p.new)), "replayed": len(plan.replayed)},
        "largest_gain": max(map(abs, plan.gains)),
        "seconds_per_earlier_task": {size: median(seconds[named(size)]) / len(p.earlier) for size in p.sizes},
    }
    print(facts)
    report(arguments, seconds, shares(seconds, p.sizes), **facts)


if __name__ == "__main__":
    main()
