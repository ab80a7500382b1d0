"""What must not change the result of a training: cuts, seeds, interruptions."""

from pathlib import Path

import pytest
import torch
from training_cases import ADAM, INSTANCES, SIX, TOKENIZER, Recorded, assert_same_weights, config, tiny, train, weights

# Adam divides each gradient by its own size: where that is nothing but rounding, only float64 shows the invariance.
SETTINGS = {
    "float32": (torch.float32, {"learning_rate": 0.02, "max_grad_norm": 1.0}),
    "float64": (torch.float64, {"learning_rate": 2e-3, "optim": "adamw_torch"}),
}


@pytest.fixture(scope="module", params=SETTINGS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Recorded]:
    """A training of eight steps with one micro-batch and one tree each."""
    dtype, options = SETTINGS[request.param]
    trainer = train(tmp_path_factory.mktemp("whole"), tiny(dtype=dtype), **SIX, **options)
    assert len(trainer.losses) == 8
    assert trainer.losses[-1] < 0.9 * trainer.losses[0]
    return request.param, trainer


@pytest.mark.parametrize(
    "cut",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
        {"max_tokens": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_tokens": 90},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_any_cut_of_the_batch_gives_the_same(tmp_path: Path, cut: dict, whole: tuple[str, Recorded]) -> None:
    name, expected = whole
    dtype, options = SETTINGS[name]
    trainer = train(tmp_path, tiny(dtype=dtype), **{**SIX, **options, **cut})
    residuals = [(a - b) / b for a, b in zip(trainer.step_losses, expected.losses, strict=True)]
    assert max(map(abs, residuals)) <= 1e-5
    # Rounding to both sides, no drift to one.
    assert abs(sum(residuals) / len(residuals)) <= 1e-7
    assert_same_weights(trainer.model, weights(expected.model), weights(tiny(dtype=dtype)), 1e-5)


@pytest.mark.parametrize("uneven", [5, 7])
def test_an_uneven_last_batch_is_normalised_by_its_own_tokens(tmp_path: Path, uneven: int) -> None:
    instances = INSTANCES[:uneven]
    one = train(tmp_path / "one", instances=instances, per_device_train_batch_size=4)
    many = train(tmp_path / "many", instances=instances, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    losses = [sum(many.losses[:4]), sum(many.losses[4:])]
    assert losses == pytest.approx(one.step_losses, rel=1e-5)
    assert_same_weights(many.model, weights(one.model), weights(tiny()), 1e-5)


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    first, second = (train(tmp_path / name, **ADAM) for name in "ab")
    other = train(tmp_path / "c", **ADAM, seed=43)
    expected = weights(first.model)
    assert all(torch.equal(x, expected[name]) for name, x in weights(second.model).items())
    assert first.losses == second.losses
    assert first.losses != other.losses


def test_resumed_training_gives_the_same_bits(tmp_path: Path) -> None:
    options = {**ADAM, "save_strategy": "steps", "save_steps": 3}
    straight = train(tmp_path, **options)
    checkpoint = tmp_path / "checkpoint-3"
    again = Recorded(tiny(), config(tmp_path, **options), INSTANCES, TOKENIZER)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.losses == straight.losses[3:]
    expected = weights(straight.model)
    assert all(torch.equal(x, expected[name]) for name, x in weights(again.model).items())
