"""Small trainings measured: what they hold in memory, alone and in two processes, and what they compute."""

import gc
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from peft import LoraConfig, get_peft_model
from test_ops_memory import allocations
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from kpig_fast.ops.linear_kpig_loss import KPIGLoss, linear_kpig_loss
from kpig_fast.ops.reference import jsd_bits
from kpig_fast.training.sizing import Setup
from kpig_fast.tree.layout import TokenTree, build
from kpig_fast.tree.model import OutputHead, run_tree, tree_mode

VOCABULARY = 1500
# Widths in about the proportions of large models.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 448,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
PROMPT, BODY, RESPONSE = 64, 40, 16
PROCESSES = 2


@dataclass(frozen=True)
class Case:
    """A way of training: ``setup`` says how, but for the tree, which has ``branches`` responses."""

    setup: Setup
    branches: int
    family: str = "llama"
    lora: bool = False

    @property
    def tree(self) -> TokenTree:
        """One instruction and ``branches`` instances of it."""
        generator = torch.Generator().manual_seed(0)
        first, *rest = (
            torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
            for n in (PROMPT, *[BODY + RESPONSE] * self.branches)
        )
        return build([first + own for own in rest], [PROMPT + BODY] * self.branches)

    def measured_setup(self, model: nn.Module) -> Setup:
        """``setup`` with the numbers of the tree, and of the adapters."""
        counts = [sum(p.numel() for p in model.parameters() if p.requires_grad == trained) for trained in (True, False)]
        share = counts[0] / counts[1] if self.lora else 1.0
        rows = self.branches * RESPONSE
        return replace(self.setup, max_tokens=len(self.tree), response_rows=rows, trained=share)

    def model(self) -> Any:
        """The model in training mode, with adapters if there are any."""
        dtype = torch.bfloat16 if self.setup.weight_bytes == 2 else torch.float32
        model: Any = make_model(self.family, dtype=dtype, **SIZES).train()
        if self.setup.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.lora:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
            model.enable_input_require_grads()
        return model

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast where layers compute in half precision."""
        return torch.autocast("cpu", torch.bfloat16) if self.setup.compute_bytes == 2 else nullcontext()

    def forward(self, model: Any) -> KPIGLoss:
        """As ``KPIGTrainer`` does it: half of the responses complete, the others masked; inside ``tree_mode``."""
        tree = self.tree
        complete, masked = torch.cat([tree.rows_of(i) for i in range(self.branches)]).chunk(2)

        def loss(hidden: Tensor, head: OutputHead) -> KPIGLoss:
            of_masked = hidden.index_select(0, masked)
            return linear_kpig_loss(
                hidden.index_select(0, complete), torch.full_like(complete, 7), of_masked, of_masked.detach() + 0.01,
                torch.ones(len(masked)), head.weight, old_head, ce_scale=0.1, jsd_scale=0.1,
            )  # fmt: skip

        dtype = torch.bfloat16 if self.setup.weight_bytes == 2 else torch.float32
        # Adapters leave the head as it was; a trained one has changed.
        old_head = model.get_output_embeddings().weight if self.lora else torch.ones(VOCABULARY, 128, dtype=dtype)
        with self.precision():
            return run_tree(model, tree, loss)


TREE: dict[str, Any] = {"max_tokens": 1000, "response_rows": 300}
# On one process; measuring puts in the numbers of the tree.
WAYS = {
    "float32": Case(Setup(**TREE), 24),
    "bfloat16": Case(Setup(**TREE, weight_bytes=2, compute_bytes=2, optimizer_bytes=4), 24),
    "autocast": Case(Setup(**TREE, compute_bytes=2), 24),
    "LoRA": Case(Setup(**TREE), 24, lora=True),
    "LoRA on bfloat16": Case(Setup(**TREE, weight_bytes=2, compute_bytes=2), 24, lora=True),
    "Qwen2": Case(Setup(**TREE), 24, family="qwen2"),
    "short": Case(Setup(**TREE), 8),
    "short autocast": Case(Setup(**TREE, compute_bytes=2), 8),
}
CASES = [
    pytest.param(replace(case, setup=replace(case.setup, gradient_checkpointing=again)), id=f"{name}-{again}")
    for name, case in WAYS.items()
    for again in (False, True)
]


def saved_bytes(case: Case) -> tuple[int, Setup]:
    """What autograd keeps of a forward pass but for weights, their copies and their gradients."""
    model = case.model()
    weights = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own and tuple(sorted(x.shape)) not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with tree_mode(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.forward(model)
    return sum(x.untyped_storage().nbytes() for x in kept.values()), case.measured_setup(model)


def peak_bytes(case: Case, wrap: Any = lambda model: model) -> tuple[int, Setup]:
    """The most that is held while a model is made and trained: one optimizer step, then two trees of the next."""
    made: list[nn.Module] = []

    def call() -> None:
        model = wrap(case.model())
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), foreach=False)
        for step in range(3):
            with tree_mode(getattr(model, "module", model)):
                case.forward(model).loss.backward()
            if step == 0:
                optimizer.step()
        made.append(model)

    # What was made before would be freed meanwhile.
    gc.collect()
    _, peak = allocations(call)
    return peak, case.measured_setup(made[0])


def peaks_in_processes(cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    """Of each case under the sharding that it names, in two processes: peak, bytes of this process' weights, setup."""
    spawn(_measure, (cases, folder), nprocs=PROCESSES)
    return json.loads((folder / "measured.json").read_text())


def _measure(rank: int, cases: dict[str, Case], folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    measured = {}
    for name, case in cases.items():
        models: list[nn.Module] = []

        def wrap(model: Any, case: Case = case, models: list[nn.Module] = models) -> nn.Module:
            models.append(DistributedDataParallel(model) if case.setup.sharding == "none" else _shard(model, case))
            return models[0]

        peak, setup = peak_bytes(case, wrap)
        own = sum(getattr(p, "_local_tensor", p).nbytes for p in models[0].parameters())
        measured[name] = {"peak": peak, "weights": own, "setup": asdict(setup)}
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    distributed.destroy_process_group()


def _shard(model: Any, case: Case) -> nn.Module:
    """As accelerate shards a model for FSDP2."""
    half = torch.bfloat16 if case.setup.compute_bytes == 2 else None
    policy = MixedPrecisionPolicy(half, half, half)
    for module in (*model.model.layers, model.model.embed_tokens):
        fully_shard(module, mp_policy=policy)
    fully_shard([model.model.norm, model.lm_head], mp_policy=policy, reshard_after_forward=False)
    return fully_shard(model, mp_policy=policy)


class Reference:
    """The training step without operators of ours but attention, whose operations a counter does not see."""

    def __init__(self, case: Case) -> None:
        self.model, self.tree = case.model(), case.tree
        self.complete, self.masked = torch.cat([self.tree.rows_of(i) for i in range(case.branches)]).chunk(2)

    def flops(self) -> int:
        """Operations of its matrix products, forward and backward."""
        with tree_mode(self.model), FlopCounterMode(display=False) as counter:
            run_tree(self.model, self.tree, lambda hidden, head: self.loss(hidden, head.weight)).backward()
        return counter.get_total_flops()

    def loss(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logits, masked = hidden[self.complete] @ weight.t(), hidden[self.masked] @ weight.t()
        old = hidden[self.masked].detach() @ weight.t().detach()
        return F.cross_entropy(logits, torch.zeros_like(self.complete)) + jsd_bits(masked, old, 1.0).sum()
