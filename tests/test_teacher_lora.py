"""The teacher of a model with adapters: base and adapters as they were; the head with adapters of its own, or refused.

Everything is held to plain passes over separate sequences with full logits, in float64.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model, worst_gradient_error
from peft import LoraConfig, get_peft_model
from separate import score_apart
from teacher_cases import every_row
from torch import Tensor, nn
from torch.func import functional_call
from training_cases import INSTANCES, TOKENIZER, Recorded, config, weights
from transformers import TrainerCallback

from kpig_fast import KeyPartScorer
from kpig_fast.method.objective import jsd_bits, kpig_loss, temperature
from kpig_fast.teacher import Teacher, make_teacher
from kpig_fast.tree.model import UnsupportedModelError

SCALE = 2.0
Tensors = dict[str, Tensor]
Forward = Callable[[Tensor], Tensor]


def plain(*, tied: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    return make_model("llama", dtype=dtype, vocab_size=len(TOKENIZER), tie_word_embeddings=tied)


def adapted(base: nn.Module, **settings: Any) -> nn.Module:
    """``base`` with an adapter that already says something."""
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, **settings}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=int(2 * SCALE), task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


class Watch(TrainerCallback):
    """Weights and gradients before each update."""

    def __init__(self) -> None:
        self.weights: list[Tensors] = []
        self.gradients: list[Tensors] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.weights.append(weights(model))
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.gradients.append({name: gradient.double().clone() for name, gradient in found.items()})


def train_two_updates(folder: Path, model: nn.Module) -> tuple[Recorded, Watch]:
    """Each update takes all instances, so that M_t has left its teacher at the second."""
    watch = Watch()
    args = config(folder, per_device_train_batch_size=len(INSTANCES), num_train_epochs=2)
    trainer = Recorded(model, args, INSTANCES, TOKENIZER, callbacks=[watch])
    trainer.train()
    assert len(watch.weights) == 2
    return trainer, watch


def formula(trainer: Recorded, gain: Tensor, student: Forward, teacher: Forward) -> Tensor:
    """Eq. 5 over all instances; ``student`` and ``teacher`` give the logits [L, V] of ids [1, L]."""
    log_probs, divergences = [], []
    for pair, g in zip(trainer.pairs, gain.tolist(), strict=True):
        answer = torch.tensor(pair.response_ids)
        complete, masked = (torch.tensor([[*ids, *pair.response_ids]]) for ids in (pair.complete_ids, pair.masked_ids))
        rows = slice(len(pair.complete_ids) - 1, -1)
        log_probs.append(student(complete)[rows].log_softmax(-1).gather(1, answer[:, None])[:, 0])
        rows = slice(len(pair.masked_ids) - 1, -1)
        divergences.append(jsd_bits(student(masked)[rows], teacher(masked)[rows].detach(), temperature(g)))
    every = torch.cat(log_probs)
    return kpig_loss(every, torch.cat(divergences), trainer.args.lam, len(every))


# Two time steps of a body with LoRA, against base + SCALE · B @ A written out


def merged(base: nn.Module, lora: Tensors) -> Tensors:
    """Float64 parameters of the plain model that base and adapter make up, as functions of the adapter's."""
    found = {name: p.detach().double() for name, p in base.named_parameters()}
    for name in lora:
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".weight")
            found[target] = found[target] + SCALE * lora[name.replace(".lora_A.", ".lora_B.")] @ lora[name]
    return found


def only_lora(state: Tensors) -> Tensors:
    return {name: x.double().requires_grad_() for name, x in state.items() if "lora_" in name}


@dataclass(frozen=True)
class TwoSteps:
    """The second of two time steps; ``adapter`` is what the first has left."""

    trainer: Recorded
    watch: Watch
    adapter: Tensors
    folder: Path
    asked: list[tuple[bool, ...]]
    formed: list[int]
    lm: nn.Module

    @property
    def teacher(self) -> Teacher:
        assert self.trainer.teacher is not None
        return self.trainer.teacher

    def last_hidden(self, lora: Tensors) -> Tensor:
        """[M, D] at the masked response rows, by separate forwards of the merged model."""
        parameters = merged(self.lm, lora)
        found = []
        for pair in self.trainer.pairs:
            ids = torch.tensor([[*pair.masked_ids, *pair.response_ids]])
            out = functional_call(self.lm, parameters, kwargs={"input_ids": ids, "output_hidden_states": True})
            found.append(out.hidden_states[-1][0, len(pair.masked_ids) - 1 : -1].detach())
        return torch.cat(found)

    def logits(self, lora: Tensors) -> Forward:
        parameters = merged(self.lm, lora)
        return lambda ids: functional_call(self.lm, parameters, kwargs={"input_ids": ids, "use_cache": False}).logits[0]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TwoSteps:
    folder = tmp_path_factory.mktemp("lora")
    model = adapted(plain(dtype=request.param))
    train_two_updates(folder / "0", model)
    adapter = only_lora(weights(model))
    asked, formed = [], []
    own = torch.ops.kpig_fast.linear_kpig_loss

    def watched(*args: Any) -> Any:
        out = own(*args)
        asked.append(args[-3:])
        formed.append(out[5].numel() + out[6].numel())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.kpig_fast, "linear_kpig_loss", watched)
        trainer, watch = train_two_updates(folder / "1", model)
    return TwoSteps(trainer, watch, adapter, folder / "1", asked, formed, plain())


def test_the_teacher_is_base_and_adapter_after_the_step_before(two: TwoSteps) -> None:
    found = every_row(two.teacher).double()
    exact = two.last_hidden(two.adapter)
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    for other in ({}, only_lora(two.watch.weights[1])):
        assert float((two.last_hidden(other) - exact).norm() / exact.norm()) > 1e-3


def test_the_head_is_neither_kept_nor_given_a_gradient(two: TwoSteps) -> None:
    assert two.teacher.weight is None
    assert two.teacher.bias is None
    assert [path.name.split("-")[0] for path in two.folder.rglob("*.safetensors")] == ["part"]
    assert set(two.asked) == {(True, False, False)}
    assert set(two.formed) == {0}
    assert set(two.watch.gradients[1]) == {name for name in two.watch.weights[1] if "lora_" in name}
    assert all(p.grad is None for name, p in two.trainer.model.named_parameters() if "lora_" not in name)  # type: ignore[union-attr]


def test_loss_and_gradients_are_the_formulas(two: TwoSteps) -> None:
    lora = only_lora(two.watch.weights[1])
    loss = formula(two.trainer, two.teacher.gain, two.logits(lora), two.logits(two.adapter))
    without = formula(two.trainer, two.teacher.gain, two.logits(lora), two.logits(lora))
    loss.backward()
    assert two.trainer.losses[1] == pytest.approx(loss.item(), rel=1e-5)
    # The divergence has a say in it.
    assert (loss - without).item() > 1e-3
    assert worst_gradient_error(two.watch.gradients[1], {name: x.grad for name, x in lora.items()}) < 1e-5  # type: ignore[misc]


# Adapters of the head, against PEFT's own forward


@dataclass(frozen=True)
class Case:
    """Settings beside LoRA of the body, and whether the teacher then keeps a head."""

    settings: dict[str, Any]
    tied: bool = False
    kept: bool = True


HANDLED = {
    "trained copy of the head": Case({"modules_to_save": ["lm_head"]}),
    "trained copy of a tied head": Case({"modules_to_save": ["lm_head"]}, tied=True),
    "trained copy of a tied pair": Case({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied=True),
    "trained copy of the embedding alone": Case({"modules_to_save": ["embed_tokens"]}, tied=True, kept=False),
    "single rows of the head": Case({"trainable_token_indices": {"lm_head": [40, 41, 66]}}),
    "single rows of a tied pair": Case({"trainable_token_indices": [40, 41, 66]}, tied=True),
    "single rows of the embedding": Case({"trainable_token_indices": [40, 41, 66]}, kept=False),
    "adapter of a tied embedding": Case({"target_modules": ["q_proj", "embed_tokens"]}, tied=True, kept=False),
    "DoRA of the body": Case({"use_dora": True}, kept=False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HANDLED)
def test_an_adapted_head_is_the_formulas(tmp_path: Path, name: str) -> None:
    case = HANDLED[name]
    model = adapted(plain(tied=case.tied), **case.settings)
    teacher, student = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    trainer, watch = train_two_updates(tmp_path, model)
    student.load_state_dict(watch.weights[1])
    assert trainer.teacher is not None
    assert (trainer.teacher.weight is not None) == case.kept
    gain = score_apart(teacher, trainer.pairs).gain
    student.zero_grad()
    loss = formula(
        trainer, gain, *(lambda ids, m=m: m(input_ids=ids, use_cache=False).logits[0] for m in (student, teacher))
    )
    loss.backward()
    exact = {name: p.grad.double() for name, p in student.named_parameters() if p.grad is not None}
    assert trainer.losses[1] == pytest.approx(loss.item(), rel=1e-6)
    assert worst_gradient_error(watch.gradients[1], exact) < 1e-6
    if case.kept:
        head = teacher.get_output_embeddings().weight  # type: ignore[operator]
        assert torch.equal(trainer.teacher.weight, head)  # type: ignore[arg-type]


def test_single_rows_count_as_trained_wherever_the_pre_pass_runs(tmp_path: Path) -> None:
    model = adapted(plain(), **HANDLED["single rows of the head"].settings)
    scorer = KeyPartScorer(model, TOKENIZER)
    with torch.no_grad():
        teacher = make_teacher(tmp_path, scorer, scorer.encoder.encode_all(INSTANCES))
    assert teacher.weight is not None


REFUSED = {
    "LoRA": Case({"target_modules": ["q_proj", "lm_head"]}),
    "DoRA": Case({"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    "LoRA of a tied head": Case({"target_modules": ["q_proj", "lm_head"]}, tied=True),
    "LoRA of a tied pair": Case({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, tied=True),
    "LoRA of its parameter": Case({"target_parameters": ["lm_head.weight"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_a_head_that_is_no_one_matrix_is_refused(name: str) -> None:
    model = adapted(plain(tied=REFUSED[name].tied), **REFUSED[name].settings)
    with pytest.raises(UnsupportedModelError, match=r"head of 'llama'.*leave it out of the adapter's target_modules"):
        KeyPartScorer(model, TOKENIZER)
