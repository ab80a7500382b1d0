"""Where a model lies while it is scored and trained: on its process' device or, under FSDP2, in pieces on all.

DeepSpeed ZeRO-3 trains it in pieces too, but between two trainings every process holds all of it.
"""

import gc
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy

from kpig_fast.data.base_model import resolve_model
from kpig_fast.processes import is_sharded, rank
from kpig_fast.training.run_config import RunConfig


def load_model(config: RunConfig, kept: Path | None, args: TrainingArguments) -> Any:
    """The model that a run goes on with, placed: what a step has kept in ``kept``, or the config's own without any."""
    # With its settings in sight, ZeRO-3 would take the model apart while it is loaded.
    unset_hf_deepspeed_config()
    base = resolve_model(config.model) if kept is None or config.lora is not None else kept
    model = AutoModelForCausalLM.from_pretrained(base, dtype=config.dtype)
    if config.lora is None or kept is None:
        set_seed(config.seed)
        return place(with_adapter(model, config), args)
    from peft import PeftModel

    return place(PeftModel.from_pretrained(model, str(kept), is_trainable=True), args)


def load_again(model: nn.Module, config: RunConfig, kept: Path, args: TrainingArguments) -> Any:
    """What a step has kept in ``kept``, in place of ``model``, which training under ZeRO-3 has left in pieces."""
    for parameter in model.parameters():
        # Else piece and optimizer stay in memory: DeepSpeed keeps the parameters of all engines that there ever were.
        vars(parameter).clear()
    gc.collect()
    return load_model(config, kept, args)


def with_adapter(model: Any, config: RunConfig) -> Any:
    """``model`` under a new adapter, if the config asks for one; the adapter leaves its outputs as they are."""
    if config.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()))


def place(model: nn.Module, args: TrainingArguments) -> Any:
    """The model as ``KPIGTrainer`` would place it, for what is measured before there is one.

    Raises:
        ValueError: as :func:`shard`.
    """
    return shard(Trainer(model=model, args=args, eval_dataset=[]))  # type: ignore[arg-type]


def shard(trainer: Trainer) -> Any:
    """The trainer's model: under FSDP2 in pieces, which its own forward puts together; otherwise as a whole.

    Raises:
        ValueError: the launch shards in a way that does not work here, or not with these arguments.
    """
    model: Any = trainer.model
    accelerator = trainer.accelerator
    deepspeed, fsdp = accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None)
    if deepspeed is not None:
        # The Trainer has brought its settings into sight again.
        unset_hf_deepspeed_config()
        if deepspeed.zero_stage == 3:
            _check_zero3(model, trainer.args, deepspeed.hf_ds_config)
        # The Trainer leaves this to the engine, which is made after all that is measured.
        model.to(accelerator.device)
        _cast(model, deepspeed.hf_ds_config.dtype())
    if fsdp is None:
        return model
    if not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported; set fsdp_version: 2 in the accelerate config")
    if is_sharded(model):
        # Accelerate would look for its layers once more, by names that they no longer have.
        fsdp.auto_wrap_policy = None
        return model
    # Accelerate shards a model together with an optimizer only; the real one is made when training begins.
    sharded, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    # PEFT hands this on to the model inside, past the forward that puts the outermost parameters together.
    register_fsdp_forward_method(sharded, "generate")
    return sharded


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has taken ``model`` apart, so that only its engine can run it."""
    return any(hasattr(p, "ds_status") for p in model.parameters())


def _check_zero3(model: nn.Module, args: TrainingArguments, settings: Any) -> None:
    if is_partitioned(model):
        raise ValueError(
            "DeepSpeed ZeRO-3 has taken this model apart, in a training or while it was loaded; "
            "load it again, before its KPIGConfig is made"
        )
    if args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy is {IntervalStrategy(args.eval_strategy).value!r}, but DeepSpeed ZeRO-3 leaves "
            "no model to evaluate inside a time step; remove it, or launch with FSDP2 (configs/accelerate/fsdp2.yaml)"
        )
    if not settings.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "DeepSpeed ZeRO-3 would keep the trained weights to itself; "
            "set zero3_save_16bit_model: true in the accelerate config (configs/accelerate/zero3.yaml)"
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """The parameters as DeepSpeed's engine will keep them: gains are of the weights that it trains and a step keeps."""
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def release_engine(engine: Any) -> None:
    """Take off its model what a DeepSpeed engine has hung on it, so that another one can train the model."""
    # It would go on exchanging gradients beside the next one.
    engine.destroy()
    # These would keep it in memory, and the state of its optimizer with it.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()


def save_model(model: Any, trainer: Trainer, folder: Path) -> None:
    """Write ``model``, which ``trainer`` has trained, and its tokenizer to ``folder``; every process calls this."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_sharded(model) else None
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, state_dict=state)
        trainer.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
