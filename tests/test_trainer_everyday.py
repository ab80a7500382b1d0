"""What people expect of a Trainer: evaluation, early stop, a step limit, schedules, throughput in the logs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import ADAM, INSTANCES, TOKENIZER, Recorded, config, tiny, train

from kpig_fast import Instance, KPIGTrainer


def own_loss(trainer: KPIGTrainer, instances: list[Instance]) -> float:
    """Mean over the response tokens, by the model's own forward."""
    total, tokens = 0.0, 0
    for pair in trainer.scorer.encoder.encode_all(instances):
        ids = torch.tensor([[*pair.complete_ids, *pair.response_ids]])
        labels = torch.tensor([[-100] * len(pair.complete_ids) + list(pair.response_ids)])
        with torch.no_grad():
            total += float(trainer.model(input_ids=ids, labels=labels).loss) * len(pair.response_ids)
        tokens += len(pair.response_ids)
    return total / tokens


def logged(trainer: KPIGTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_evaluates_as_often_as_asked(tmp_path: Path) -> None:
    args = config(tmp_path, **ADAM, eval_strategy="steps", eval_steps=4)
    trainer = KPIGTrainer(tiny(), args, INSTANCES[:9], TOKENIZER, eval_dataset=INSTANCES[9:])
    before = own_loss(trainer, INSTANCES[9:])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert trainer.evaluate(INSTANCES[:2], metric_key_prefix="x")["x_loss"] != pytest.approx(before, rel=1e-3)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert len(losses) == trainer.state.max_steps // 4 == 2
    assert losses[-1] == pytest.approx(own_loss(trainer, INSTANCES[9:]), rel=1e-5)
    assert losses[-1] < before


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    plain = train(tmp_path / "a", **ADAM)
    args = config(tmp_path / "b", **ADAM, eval_strategy="steps", eval_steps=1)
    trainer = Recorded(tiny(), args, INSTANCES, TOKENIZER, eval_dataset=INSTANCES)
    trainer.train()
    assert trainer.losses == plain.losses


def test_stops_early(tmp_path: Path) -> None:
    # Nothing is learnt, so that the second evaluation is no better than the first, nor the third.
    options = {**ADAM, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "early_stop_patience": 2}
    trainer = KPIGTrainer(tiny(), config(tmp_path, **options), INSTANCES, TOKENIZER, eval_dataset=INSTANCES)
    trainer.train()
    assert trainer.state.global_step == 3 < trainer.state.max_steps


def test_keeps_the_best_when_asked(tmp_path: Path) -> None:
    # At this rate the loss rises in the end.
    options = {**ADAM, "learning_rate": 1.0, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    options |= {"save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = KPIGTrainer(tiny(), config(tmp_path, **options), INSTANCES, TOKENIZER, eval_dataset=INSTANCES)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stop_patience": 3}, "early_stop_patience needs evaluations; set eval_strategy"),
        ({"early_stop_patience": 0, "eval_strategy": "epoch"}, "early_stop_patience is 0; give 1 evaluation or more"),
        ({"max_tokens": 0}, "max_tokens is 0; give a number of tokens, at least 1, or auto"),
        ({"max_tokens": "many"}, "max_tokens is 'many'"),
        ({"teacher_dtype": "int8"}, "teacher_dtype is 'int8'; give bfloat16"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_max_steps_and_schedule(tmp_path: Path) -> None:
    trainer = train(tmp_path, **{**ADAM, "max_steps": 5, "lr_scheduler_type": "linear", "warmup_steps": 2})
    rates = logged(trainer, "learning_rate")
    assert rates == pytest.approx([2e-3 * x for x in (0, 1 / 2, 1, 2 / 3, 1 / 3)])


def test_throughput_counts_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr("kpig_fast.training.tally.time.perf_counter", lambda: float(next(now)))
    trainer = train(tmp_path, **{**ADAM, "logging_steps": 2, "gradient_accumulation_steps": 2})
    # The clock of the first log starts with the training; one second a look, and one look a log.
    assert logged(trainer, "instances_per_second")[1:] == [24.0] * (len(logged(trainer, "loss")) - 1)
    tokens = sum(len(pair.complete_ids) + len(pair.response_ids) for pair in trainer.pairs)
    assert logged(trainer, "tokens_per_second")[1:] == [2.0 * tokens] * (len(logged(trainer, "loss")) - 1)


def test_a_tracker_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(tmp_path, **ADAM, report_to="tensorboard")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert {"train/loss", "train/cross_entropy", "train/jsd", "train/tokens_per_second"} <= set(
        events.Tags()["scalars"]
    )
