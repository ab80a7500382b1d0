"""A small training: twelve instances, a tiny random model, and how two results are compared."""

from pathlib import Path
from typing import Any

import torch
from evaluation_models import byte_tokenizer
from families import make_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from kpig_fast import Instance, KPIGConfig, KPIGTrainer

TOKENIZER = byte_tokenizer()
EVEN = 'Answer "yes" or "no" in capitals: is the number even?'
HELLO = "Greet the person in small letters."
INSTANCES = [
    *(
        Instance(EVEN, "NO" if n % 2 else "YES", str(n), ('"yes" or "no"', "capitals"), id=f"even-{n}")
        for n in range(8)
    ),
    *(Instance(HELLO, f"hello {name}", name.title(), ("small letters",)) for name in ("ann", "bo", "cleo")),
    Instance("Nothing is masked here.", "indeed"),
]

# Eight steps of six instances.
SIX = {"per_device_train_batch_size": 6, "num_train_epochs": 4}
ADAM = {**SIX, "optim": "adamw_torch", "learning_rate": 2e-3}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return make_model(family, dtype=dtype, vocab_size=len(TOKENIZER))


def config(folder: Path, **changes: Any) -> KPIGConfig:
    """Three steps over twelve instances with plain gradient descent, so that the weights show the gradients."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lam": 3.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return KPIGConfig(**{**defaults, **changes})


class Recorded(KPIGTrainer):
    """Keeps the loss of every micro-batch, as exact as it is."""

    losses: list[float]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss

    @property
    def step_losses(self) -> list[float]:
        n = self.args.gradient_accumulation_steps
        return [sum(self.losses[i : i + n]) for i in range(0, len(self.losses), n)]


def train(folder: Path, model: nn.Module | None = None, instances: list[Instance] = INSTANCES, **changes) -> Recorded:
    model = tiny() if model is None else model
    trainer = Recorded(model, config(folder, **changes), instances, TOKENIZER)
    trainer.train()
    return trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor], start: dict[str, Tensor], rel: float) -> None:
    """What training changed agrees: the error of the whole change, relative to it."""
    found = weights(model)
    error = sum(float((found[name] - x).double().square().sum()) for name, x in expected.items())
    change = sum(float((start[name] - x).double().square().sum()) for name, x in expected.items())
    assert change > 0
    assert (error / change) ** 0.5 <= rel
