"""What one process of a launch does in ``test_distributed.py``.

distributed_worker.py OUT [NAME=JSON ...]   the small training of ``training_cases``, kept in OUT
distributed_worker.py kpig ARGUMENT ...     the command line
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin, DistributedType, PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import Tensor, nn
from training_cases import INSTANCES, SIX, TOKENIZER, Recorded, config, tiny, weights

from kpig_fast import cli
from kpig_fast.processes import gather, is_sharded, leave, rank, whole
from kpig_fast.training.placement import is_partitioned

# The trees are so small that processes differ in their number.
CHANGES = {**SIX, "learning_rate": 0.02, "max_grad_norm": 1.0, "max_tokens": 90}


class Gathered(Recorded):
    """Keeps the loss of every optimizer step, over all processes; a tree of more than ``room`` tokens has no room."""

    room = 1_000_000

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if len(inputs["forest"].tree) > self.room:
            raise torch.OutOfMemoryError("no room.")
        return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def step_losses(self) -> list[float]:
        n = self.args.gradient_accumulation_steps
        mine = [sum(self.losses[i : i + n]) for i in range(0, len(self.losses), n)]
        # What each returns is scaled up for the mean over the processes that its gradient goes through.
        return [sum(losses) / self.args.world_size for losses in zip(*gather([mine]))]


def train(folder: Path, **changes) -> Gathered:
    torch.set_num_threads(1)
    resume, room = changes.pop("resume", None), changes.pop("room", None)
    trainer = Gathered(tiny(), config(folder, **{**CHANGES, **changes}), INSTANCES, TOKENIZER)
    if room and rank() == 1:
        trainer.room = room
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def whole_weights(trainer: Gathered) -> dict[str, Tensor]:
    state: Any = weights(trainer.model)
    if is_partitioned(trainer.model):
        # DeepSpeed gives them to process 0.
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    return {name.removeprefix("module."): whole(x).cpu().clone() for name, x in state.items()}


def n_hooks(model: nn.Module) -> int:
    """How many functions are called when a module of ``model`` runs, or when a gradient of it is there."""
    modules = [len(hooks) for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    return sum(modules) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def main(out: Path, *changes: str) -> None:
    trainer = train(
        out, **{name: json.loads(value) for name, _, value in (change.partition("=") for change in changes)}
    )
    losses, final, sharded = trainer.step_losses, whole_weights(trainer), is_sharded(trainer.model)
    if rank() == 0:
        save_file(final, out / "weights.safetensors")
        logs = [entry["cross_entropy"] for entry in trainer.state.log_history if "cross_entropy" in entry]
        result = {"losses": losses, "logs": logs, "sharded": sharded, "processes": trainer.args.world_size}
        result["hooks"] = n_hooks(trainer.model)
        result["elements"] = sum(p.numel() for p in trainer.model.parameters())
        result["flos"] = trainer.state.total_flos
        result["max_tokens"] = trainer.data_collator.max_tokens
        (out / "result.json").write_text(json.dumps(result))


def allow_sharding_on_cpu() -> None:
    """Accelerate takes settings of FSDP and DeepSpeed for GPUs only; what it then does works on CPUs as well."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        launched_as = DistributedType.MULTI_GPU
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        launched_as = DistributedType.DEEPSPEED
    else:
        return
    initialize = AcceleratorState.__init__

    def as_on_gpus(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        if not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = launched_as
        initialize(self, *args, **kwargs)

    AcceleratorState.__init__ = as_on_gpus


def partition_small_parameters() -> None:
    """DeepSpeed ZeRO-3 leaves parameters on every process that have as few elements as those of the tests."""
    finish = DeepSpeedPlugin.__post_init__

    def without_threshold(self: DeepSpeedPlugin) -> None:
        finish(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = without_threshold


if __name__ == "__main__":
    allow_sharding_on_cpu()
    partition_small_parameters()
    if sys.argv[1] == "kpig":
        sys.exit(cli.main(sys.argv[2:]))
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave()
