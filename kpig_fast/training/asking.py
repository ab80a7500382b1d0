"""A model that is not trained here, asked what a run asks: a folder that is compared with runs like any other."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from kpig_fast.data.base_model import resolve_model
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Row
from kpig_fast.data.templates import Question
from kpig_fast.endpoint import Endpoint
from kpig_fast.environment import environment
from kpig_fast.evaluation.evaluate import Prediction, ask, questions, score_predictions
from kpig_fast.evaluation.half_listening import changed_questions, score_obedience
from kpig_fast.evaluation.runs import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    HALF_LISTENING_FILE,
    PREDICTIONS_FILE,
    UNTRAINED,
    StepMetrics,
    is_complete,
    mark_complete,
    read_run,
    step_folder,
    write_metrics,
)
from kpig_fast.evaluation.served import ask_served
from kpig_fast.training.data import load_data
from kpig_fast.training.placement import load_model
from kpig_fast.training.planning import make_steps, training_arguments
from kpig_fast.training.run_config import RunConfig, dump_run_config
from kpig_fast.training.stream import DATA_HASH_FILE, DATA_REPORT_FILE, check_unchanged, data_hash

ANSWERS_FOLDER = "answers"


def ask_model(config: RunConfig, endpoint: Endpoint | None = None, *, progress: bool = True) -> StepMetrics:
    """Ask the tasks of all steps and the held-out ones, and those with a changed wording under it, too.

    Answers and figures are kept in ``config.output_dir``.

    The folder is that of a run which has evaluated the untrained model and taken no step. One that is complete is read.

    Args:
        config: the run; its ``model`` is the one that is asked.
        endpoint: asks the model where it is served; None loads ``config.model``.
        progress: show progress bars.

    Raises:
        ValueError: the folder belongs to another config or other data, the data is bad, or the model cannot be asked.
        ConnectionError: the served model cannot be reached.
    """
    run = config.output_dir
    resolved = dump_run_config(config)
    check_unchanged(run / CONFIG_FILE, resolved, "config")
    collection, report = load_data(config.data, progress=progress)
    steps = make_steps(collection, config)
    hashed = data_hash(collection, steps)
    check_unchanged(run / DATA_HASH_FILE, hashed, "data")
    folder = step_folder(run, UNTRAINED)
    if is_complete(folder):
        return read_run(run)[0]
    for name, text in (
        (CONFIG_FILE, resolved.rstrip("\n")),
        (DATA_HASH_FILE, hashed),
        (ENVIRONMENT_FILE, json.dumps(environment(), indent=2)),
        (DATA_REPORT_FILE, str(report)),
    ):
        write_lines(run / name, [text])
    tasks = [name for step in steps for name in step] + collection.names("held_out")
    settings = config.evaluation
    answer = _loaded(config, progress) if endpoint is None else _served(config, endpoint, progress)
    asked = questions(collection, tasks, settings.split, settings.limit, settings.demonstrations)
    predictions = answer(asked, folder / PREDICTIONS_FILE)
    changed = changed_questions(collection, tasks, settings.split, settings.half_listening)
    answers = answer(changed, folder / HALF_LISTENING_FILE) if changed else []
    metrics = StepMetrics(
        step=UNTRAINED,
        strategy="untrained",
        tasks=(),
        replayed=(),
        evaluation=score_predictions(predictions, collection),
        gains={},
        obedience=tuple(score_obedience(answers, collection)),
    )
    write_metrics(run, metrics)
    mark_complete(folder)
    return metrics


_Answer = Callable[[Sequence[tuple[Row, Question]], Path], list[Prediction]]
"""Asks questions, and keeps the answers in a file."""


def _loaded(config: RunConfig, progress: bool) -> _Answer:
    arguments = training_arguments(config, config.output_dir, 0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(config.model))
    encoder = PromptEncoder(tokenizer, template=arguments.template)
    # Nothing is trained, hence no adapter is wanted.
    model = load_model(config.model_copy(update={"lora": None}), None, arguments)

    def answer(asked: Sequence[tuple[Row, Question]], path: Path) -> list[Prediction]:
        return ask(
            model,
            tokenizer,
            [row for row, _ in asked],
            [encoder.prompt(*question) for _, question in asked],
            encoder=encoder,
            max_new_tokens=config.evaluation.max_new_tokens,
            progress=progress,
            predictions_path=path,
        )

    return answer


def _served(config: RunConfig, endpoint: Endpoint, progress: bool) -> _Answer:
    cached = replace(endpoint, cache=config.output_dir / ANSWERS_FOLDER)
    template = training_arguments(config, config.output_dir, 0).template

    def answer(asked: Sequence[tuple[Row, Question]], path: Path) -> list[Prediction]:
        return ask_served(
            cached,
            asked,
            template=template,
            max_new_tokens=config.evaluation.max_new_tokens,
            progress=progress,
            predictions_path=path,
        )

    return answer
