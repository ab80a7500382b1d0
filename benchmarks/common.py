"""What the benchmarks share: real instances, a model of realistic size, timing in rounds, and the record of a run."""

import json
import os
import subprocess
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from kpig_fast import Instance
from kpig_fast.data.files import write_lines
from kpig_fast.data.natural_instructions import load_natural_instructions
from kpig_fast.data.schema import make_instance
from kpig_fast.environment import environment
from kpig_fast.ops.reference import IGNORE

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / ".." / "shared"
# Random weights find every answer as unlikely as any other text. Larger logits for the tokens that occur in answers
# give gains far above the tolerance with which they are compared.
ANSWER_SPREAD = 10.0
# How often a contestant runs that takes several times as long as the others.
SLOW_ROUNDS = 3
SPECIAL_TOKENS = "bos_token_id", "eos_token_id", "pad_token_id"

Seconds = dict[str, list[float]]
# Prepares a run, untimed, and returns what is timed.
Contestant = Callable[[], Callable[[], Any]]


@dataclass(frozen=True)
class Setting:
    """What all contestants work on."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    instances: list[Instance]


def run_options(description: str) -> ArgumentParser:
    """The options of every benchmark."""
    options = ArgumentParser(description=description)
    options.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    options.add_argument("--quick", dest="rounds", action="store_const", const=1, help="one round, for a first look")
    options.add_argument("--processor-time", action="store_true", help="for a busy machine; together with --threads 1")
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: %(default)s)")
    options.add_argument("--out", type=Path, help="JSON file for the record of the run")
    return options


def parser(description: str, *, tasks: int, instances: int) -> ArgumentParser:
    """The options of a benchmark on real instances, with its own default sizes."""
    options = run_options(description)
    options.add_argument("--tasks", type=int, default=tasks, help=f"number of tasks (default: {tasks})")
    options.add_argument("--instances", type=int, default=instances, help=f"of each task (default: {instances})")
    options.add_argument("--hidden", type=int, default=512, help="hidden size of the model (default: 512)")
    options.add_argument("--layers", type=int, default=8, help="layers of the model (default: 8)")
    options.add_argument("--batch", type=int, default=8, help="sequences of a padded batch (default: 8)")
    options.add_argument("--data", type=Path, default=SHARED / "data/sni_core", help="holds tasks/ and manifest.json")
    options.add_argument("--tokenizer", default=str(SHARED / "models/gpt2-tokenizer"), help="folder or hub name")
    return options


def setting(arguments: Namespace) -> Setting:
    """What ``arguments`` ask for; torch gets its number of threads, too."""
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    instances = load_instances(arguments.data, arguments.tasks, arguments.instances)
    model = make_model(tokenizer, arguments.hidden, arguments.layers)
    answers = tokenizer([f" {instance.output}" for instance in instances])["input_ids"]
    model.lm_head.weight.data[sorted({token for answer in answers for token in answer})] *= ANSWER_SPREAD
    return Setting(model, tokenizer, instances)


def load_instances(folder: Path, n_tasks: int, per_task: int) -> list[Instance]:
    """The first training instances of the first seen tasks, task after task, with the definition as instruction.

    Args:
        folder: holds ``tasks/``, official Natural Instructions files, and ``manifest.json`` with their key parts.
        n_tasks, per_task: how many tasks, and how many instances of each.

    Raises:
        ValueError: the folder holds too few.
    """
    collection, _ = load_natural_instructions(folder / "tasks", side_file=folder / "manifest.json")
    chosen = [collection.tasks[name] for name in collection.names("seen")[:n_tasks]]
    rows = [row for task in chosen for row in collection.of_task(task.task, "train")[:per_task]]
    instances = [make_instance(collection.tasks[row.task], row) for row in rows]
    if len(instances) < n_tasks * per_task:
        raise ValueError(f"{folder} holds {len(instances)} of {n_tasks} x {per_task} instances; ask for fewer")
    return instances


def make_model(tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama in float32 with an untied head and random weights, the same in every run."""
    torch.manual_seed(0)
    special: dict[str, Any] = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **special,
    )
    return LlamaForCausalLM(config).eval()


def labelled(prompt: Sequence[int], response: Sequence[int]) -> dict[str, list[int]]:
    """One sequence as transformers' collators take it: the labels are the response tokens."""
    return {"input_ids": [*prompt, *response], "labels": [IGNORE] * len(prompt) + [*response]}


def race(
    contestants: Mapping[str, Contestant], rounds: int, *, processor_time: bool = False, slow: Collection[str] = ()
) -> Seconds:
    """Seconds of every contestant in every round: of wall time, or of processor time over all threads.

    Each round runs all of them, so that a machine that is busy for a while is busy for all, and starts with another.
    Only the first ``SLOW_ROUNDS`` run the ``slow`` ones.
    """
    clock = time.process_time if processor_time else time.perf_counter
    seconds: Seconds = {name: [] for name in contestants}
    with tqdm(total=rounds * len(contestants) - max(0, rounds - SLOW_ROUNDS) * len(slow), desc="timing") as bar:
        for number in range(rounds):
            names = [name for name in contestants if number < SLOW_ROUNDS or name not in slow]
            first = number % len(names)
            for name in names[first:] + names[:first]:
                run = contestants[name]()
                started = clock()
                run()
                seconds[name].append(clock() - started)
                bar.update()
    return seconds


def ratios(seconds: Seconds, name: str, other: str) -> list[float]:
    """Seconds of ``name`` divided by those of ``other``, round by round, in the rounds that ran both."""
    return [a / b for a, b in zip(seconds[name], seconds[other])]


def require(what: str, value: float, limit: float) -> None:
    """Raise ValueError unless ``value <= limit``: no speed is reported for another result."""
    print(f"{what} {value:.1e}, at most {limit:.1e} allowed")
    if not value <= limit:
        raise ValueError(f"{what} {value:.3e}, more than {limit:.1e}: the contestants do not compute the same")


def report(arguments: Namespace, seconds: Seconds, shares: Mapping[str, list[float]], **facts: Any) -> None:
    """Print the medians, those of the ratios as rows of a table; with ``--out`` write the record, whole or not at all.

    Args:
        arguments: the options of the run.
        seconds: of every contestant, one a round.
        shares: the ratios that the benchmark is about, one a round.
        facts: what else belongs into the record.
    """
    medians = {name: round(median(values), 2) for name, values in shares.items()}
    for name, values in seconds.items():
        print(f"{median(values):9.3f} s  {name}")
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} |")
    if arguments.out:
        run = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "environment": environment(),
            "load_average": os.getloadavg(),
            "options": {name: value for name, value in vars(arguments).items() if isinstance(value, (int, list))},
            **facts,
            "median_ratios": medians,
            "ratios": shares,
            "seconds": seconds,
        }
        write_lines(arguments.out, [json.dumps(run, indent=1)])


def _commit() -> str:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--", "kpig_fast", "csrc", "benchmarks/*.py") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
