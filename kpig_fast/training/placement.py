"""Where a model lies while it is scored and trained: on its process' device or, under FSDP2, in pieces on all."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from kpig_fast.data.base_model import resolve_model
from kpig_fast.processes import is_sharded
from kpig_fast.training.run_config import RunConfig


def load_model(config: RunConfig, kept: Path | None, args: TrainingArguments) -> Any:
    """The model that a run goes on with, placed: what a step has kept in ``kept``, or the config's own without any."""
    base = resolve_model(config.model) if kept is None or config.lora is not None else kept
    model = AutoModelForCausalLM.from_pretrained(base, dtype=config.dtype)
    if config.lora is None or kept is None:
        set_seed(config.seed)
        return place(with_adapter(model, config), args)
    from peft import PeftModel

    return place(PeftModel.from_pretrained(model, str(kept), is_trainable=True), args)


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
    trainer = Trainer(model=model, args=args, eval_dataset=[])  # type: ignore[arg-type]
    return shard(trainer.model, trainer.accelerator)


def shard(model: Any, accelerator: Accelerator) -> Any:
    """Under FSDP2 the model in pieces, which its own forward puts together; as it is otherwise, or when it is sharded.

    Raises:
        ValueError: the launch asks for a way of sharding in which a model cannot be scored before it is trained.
    """
    deepspeed, fsdp = accelerator.state.deepspeed_plugin, getattr(accelerator.state, "fsdp_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "DeepSpeed ZeRO-3 leaves no weights to measure gains with before training; "
            "launch with FSDP2, which shards as much (configs/accelerate/fsdp2.yaml), or with ZeRO stage 2"
        )
    if deepspeed is not None:
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
    return sharded


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
