"""Out of memory while training: the budget of a tree halves, and the result is that of a run that never had it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import INSTANCES, SIX, TOKENIZER, Recorded, assert_same_weights, config, tiny, train, weights

from kpig_fast.training import trainer as module

OPTIONS = {**SIX, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.02}


class Small(Recorded):
    """Runs out of memory in every tree above ``room`` tokens, before or behind its backward pass."""

    room = 100
    behind = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.tokens = len(inputs["forest"].tree)
        if self.tokens > self.room and not self.behind:
            raise torch.OutOfMemoryError("no room.")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        backward = self.accelerator.backward

        def fails_behind(loss: Tensor, **options: Any) -> None:
            backward(loss, **options)
            if self.tokens > self.room:
                raise torch.OutOfMemoryError("no room.")

        self.accelerator.backward = fails_behind
        return super().train(*args, **kwargs)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_halves_and_goes_on_with_the_same_result(tmp_path: Path, behind: bool, workers: int) -> None:
    expected = train(tmp_path / "a", **OPTIONS)
    trainer = Small(tiny(), config(tmp_path / "b", **OPTIONS, dataloader_num_workers=workers), INSTANCES, TOKENIZER)
    trainer.behind = behind
    # Some optimizer batches fit at first.
    with pytest.warns(UserWarning, match="out of memory: trees have 64 tokens from now on"):
        trainer.train()
    assert trainer.data_collator.max_tokens == 64
    assert trainer.step_losses == pytest.approx(expected.step_losses, rel=1e-5)
    assert_same_weights(trainer.model, weights(expected.model), weights(tiny()), 1e-5)
    figures = [
        [entry[name] for entry in one.state.log_history for name in ("cross_entropy", "jsd") if name in entry]
        for one in (trainer, expected)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5, abs=1e-8)


def test_a_single_instance_without_room_is_an_error(tmp_path: Path) -> None:
    trainer = Small(tiny(), config(tmp_path, **OPTIONS), INSTANCES, TOKENIZER)
    trainer.room = 1
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError, match="shorten it"):
        trainer.train()


def test_processes_with_pieces_of_a_model_are_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Small(tiny(), config(tmp_path, **OPTIONS, max_tokens=4096), INSTANCES, TOKENIZER)
    inputs = trainer.data_collator(list(map(module.TrainingExample, trainer.pairs)))
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    trainer.is_fsdp_enabled = True
    with pytest.raises(torch.OutOfMemoryError, match=r"training\.max_tokens to 2048 and start again"):
        trainer.training_step(trainer.model, inputs, torch.tensor(1))
