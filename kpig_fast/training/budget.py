"""How many tokens a tree may have: as the config says or, for ``auto``, as the memory of this machine allows."""

from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env

from kpig_fast.processes import gather
from kpig_fast.training.config import KPIGConfig
from kpig_fast.training.sizing import ModelShape, Setup, largest_tree

# On a CPU larger trees save few tokens and leave its caches.
CPU_TOKENS = 8192


def tree_budget(model: Any, args: KPIGConfig) -> int:
    """``args.max_tokens``, ``auto`` resolved for trees of response tokens alone, which take the most memory.

    Args:
        model: a causal language model, adapters included, where it will be trained, or on the meta device.
        args: how it will be trained.
    """
    if args.max_tokens != "auto":
        return args.max_tokens
    shape = ModelShape.of(model.config)
    largest = largest_tree(shape, training_setup(shape, model, args, tokens=1, rows=1), _memory(model, args))
    return min(gather([largest if args.device.type == "cuda" else min(largest, CPU_TOKENS)]))


def training_setup(shape: ModelShape, model: Any, args: KPIGConfig, *, tokens: int, rows: int) -> Setup:
    """What ``args`` and the launch say about memory, for trees of ``tokens`` with ``rows`` response rows."""
    full = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    deepspeed = args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / shape.parameters
    weight_bytes, half = model.dtype.itemsize, args.bf16 or args.fp16
    if half and trained == 1 and (full or deepspeed):
        # Accelerate keeps what FSDP trains in float32; DeepSpeed keeps that beside half-precision weights.
        weight_bytes = 4 if full else 2
    on_gpu = args.device.type == "cuda"
    return Setup(
        processes=args.world_size,
        sharding="full" if full else "gradients" if deepspeed else "none",
        trained=trained,
        weight_bytes=weight_bytes,
        compute_bytes=compute_dtype(model, args).itemsize,
        optimizer_bytes=8 if trained < 1 else 12 if half and deepspeed else 2 * weight_bytes,
        max_tokens=tokens,
        response_rows=rows,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        distils=args.lam > 0,
        device_bytes=torch.cuda.get_device_properties(args.device).total_memory if on_gpu else None,
    )


def compute_dtype(model: Any, args: KPIGConfig) -> torch.dtype:
    """In which the layers' matrix products are computed."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype


def _memory(model: Any, args: KPIGConfig) -> int:
    """Bytes for the model and its training: what is free, and what the model fills already."""
    if args.device.type == "cuda":
        return torch.cuda.mem_get_info(args.device)[0] + torch.cuda.memory_reserved(args.device)
    here = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type == "cpu")
    return psutil.virtual_memory().available + here
