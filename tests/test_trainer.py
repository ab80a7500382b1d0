"""``KPIGTrainer`` against the method's formula with everything in the loop; what it leaves behind and refuses."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training_cases import ADAM, EVEN, INSTANCES, TOKENIZER, Recorded, assert_same_weights, config, tiny, train, weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from kpig_fast import Instance, KeyPartScorer, KPIGConfig, KPIGTrainer
from kpig_fast.data.encoding import EncodedPair
from kpig_fast.method.objective import jsd_bits, kpig_loss, temperature


def response_logits(model: nn.Module, prompt: list[int], pair: EncodedPair) -> Tensor:
    ids = torch.tensor([[*prompt, *pair.response_ids]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]


def train_by_the_formula(model: PreTrainedModel, args: KPIGConfig) -> list[float]:
    """The method as it is written: separate sequences, full logits, the teacher in the loop; the loss of each step."""
    teacher = copy.deepcopy(model)
    scorer = KeyPartScorer(model, TOKENIZER)
    pairs, scores = scorer.encoder.encode_all(INSTANCES), scorer.score(INSTANCES)
    losses = []
    for epoch in range(int(args.num_train_epochs)):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(INSTANCES))
        for batch in (order[:4], order[4:8], order[8:]):
            log_probs, divergences = [], []
            for i in batch:
                response = torch.tensor(pairs[i].response_ids)
                complete = response_logits(model, pairs[i].complete_ids, pairs[i]).log_softmax(-1)
                log_probs.append(complete.gather(1, response[:, None])[:, 0])
                with torch.no_grad():
                    target = response_logits(teacher, pairs[i].masked_ids, pairs[i])
                student = response_logits(model, pairs[i].masked_ids, pairs[i])
                beta = args.fixed_temperature or temperature(float(scores.gain[i]))
                divergences.append(jsd_bits(student, target, beta))
            tokens = sum(len(pairs[i].response_ids) for i in batch)
            loss = kpig_loss(torch.cat(log_probs), torch.cat(divergences), args.lam, tokens)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= args.learning_rate * parameter.grad
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"lam": 0.0}),
        ("llama", {"fixed_temperature": 1.7, "num_train_epochs": 2}),
        ("gemma2", {}),
        ("granite", {}),
        ("phi", {"max_tokens": 60}),
        ("gpt2", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    ],
    ids=str,
)
def test_is_the_formula(tmp_path: Path, family: str, changes: dict) -> None:
    args = config(tmp_path, **changes)
    formula, start = tiny(family, torch.float64), weights(tiny(family, torch.float64))
    losses = train_by_the_formula(formula, args)
    trainer = train(tmp_path, tiny(family, torch.float64), **changes)
    assert trainer.step_losses == pytest.approx(losses, rel=1e-6)
    assert len(losses) == 3 * args.num_train_epochs
    assert_same_weights(trainer.model, weights(formula), start, 1e-5)
    if args.lam:
        # The divergence had a say: it is 0 at the first step, and the model then leaves its teacher.
        logged = [entry["jsd"] for entry in trainer.state.log_history if "jsd" in entry]
        assert logged[0] == pytest.approx(0, abs=1e-9)
        assert logged[-1] > 1e-3


def test_the_divergence_changes_the_result(tmp_path: Path) -> None:
    with_it, without = train(tmp_path / "a"), train(tmp_path / "b", lam=0.0)
    assert with_it.step_losses[0] == pytest.approx(without.step_losses[0], rel=1e-6)
    assert abs(with_it.step_losses[2] - without.step_losses[2]) > 1e-3
    assert without.teacher is None
    assert not (tmp_path / "b" / "teacher").exists()


def test_plain_cross_entropy_is_the_models_own_loss(tmp_path: Path) -> None:
    model = tiny()
    trainer = Recorded(model, config(tmp_path, lam=0.0, per_device_train_batch_size=12), INSTANCES, TOKENIZER)
    losses, tokens = [], 0
    for pair in trainer.pairs:
        ids = torch.tensor([[*pair.complete_ids, *pair.response_ids]])
        labels = torch.tensor([[-100] * len(pair.complete_ids) + list(pair.response_ids)])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss) * len(pair.response_ids))
        tokens += len(pair.response_ids)
    trainer.train()
    assert trainer.step_losses == pytest.approx([sum(losses) / tokens], rel=1e-6)


# Adapters, precision, what is left behind


def test_lora_trains_only_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = weights(model)
    wanted = []
    own = torch.ops.kpig_fast.linear_kpig_loss

    def recorded(*args: Any) -> Any:
        wanted.append(args[-3:])
        return own(*args)

    monkeypatch.setattr(torch.ops.kpig_fast, "linear_kpig_loss", recorded)
    trainer = train(tmp_path, model, optim="adamw_torch", learning_rate=1e-2, num_train_epochs=4)
    assert trainer.step_losses[-1] < 0.8 * trainer.step_losses[0]
    changed = {name for name, x in weights(model).items() if not torch.equal(x, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert trainer.teacher is not None
    assert trainer.teacher.weight is None
    # The frozen head asks for no gradient of its own.
    assert set(wanted) == {(True, False, False)}


def test_mixed_precision_trains_and_leaves_no_wrapper(tmp_path: Path) -> None:
    exact = train(tmp_path / "a", **ADAM)
    model = tiny()
    mixed = train(tmp_path / "b", model, **ADAM, bf16=True)
    assert mixed.step_losses == pytest.approx(exact.step_losses, rel=2e-2)
    assert mixed.step_losses != exact.step_losses
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model)
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, len(TOKENIZER))


def test_bf16_weights_train(tmp_path: Path) -> None:
    trainer = train(tmp_path, tiny(dtype=torch.bfloat16), **ADAM)
    assert trainer.step_losses[-1] < 0.95 * trainer.step_losses[0]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


def test_checkpoints_load_without_the_package(tmp_path: Path) -> None:
    trainer = train(tmp_path, save_strategy="steps", save_steps=3)
    folder = tmp_path / "checkpoint-3"
    assert "kpig" not in (folder / "config.json").read_text("utf-8")
    assert "kpig" not in (folder / "generation_config.json").read_text("utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config._attn_implementation == "sdpa"
    for name, x in weights(trainer.model).items():
        assert torch.equal(loaded.state_dict()[name], x)


def test_the_model_answers_with_its_own_attention_afterwards(tmp_path: Path) -> None:
    model = tiny()
    train(tmp_path, model)
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)
    fresh = tiny()
    fresh.load_state_dict(model.state_dict())
    model.eval()
    ids = torch.tensor([[5, 9, 40, 7]])
    answers = [
        lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        for lm in (model, fresh)
    ]
    assert torch.equal(*answers)


def test_an_interrupted_training_gives_the_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(KPIGTrainer, "compute_loss", fails)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model)
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)


def test_a_second_training_starts_from_a_new_teacher(tmp_path: Path) -> None:
    model = tiny()
    train(tmp_path / "0", model)
    second = train(tmp_path / "1", model)
    logged = [entry["jsd"] for entry in second.state.log_history if "jsd" in entry]
    assert logged[0] == pytest.approx(0, abs=1e-7)
    # Also in a folder that holds an older one.
    third = train(tmp_path / "1", model)
    assert third.state.log_history[0]["jsd"] == pytest.approx(0, abs=1e-7)


def test_logs(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry, loss in zip(entries, trainer.step_losses, strict=True):
        assert entry["loss"] == pytest.approx(loss, rel=1e-3)
        assert entry["cross_entropy"] + 3.0 * entry["jsd"] == pytest.approx(loss, rel=1e-5)
    assert trainer.state.total_flos > 0
    json.dumps(trainer.state.log_history)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": -0.1}, r"lam is -0\.1; the weight of the divergence is 0 or more"),
        ({"max_tokens": 0}, "max_tokens is 0; give a number of tokens, at least 1, or auto"),
        ({"fixed_temperature": 0.0}, r"fixed_temperature is 0\.0; a temperature is positive"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("instances", "changes", "message"),
    [
        ([], {}, "train_dataset is empty; give at least one instance"),
        ([Instance(EVEN, "NO", "7", ("purple",), id="9")], {}, "instance '9': key part 'purple' does not occur"),
        ([Instance(EVEN, "NO", "7" * 99, id="9")], {}, "instance '9' needs .* positions, but the model has 128"),
        ([INSTANCES[0], Instance(EVEN, "")], {"end_of_sequence": False}, "instance 1 has an empty response; drop it"),
        ([{"text": "no form"}], {}, "fields found: text"),
        (INSTANCES, {"alpha": 2.0}, r"alpha is 2\.0"),
    ],
)
@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_wrong_data_is_named_before_training(
    tmp_path: Path, instances: list, changes: dict, message: str, lam: float
) -> None:
    with pytest.raises(ValueError, match=message):
        KPIGTrainer(tiny(), config(tmp_path, lam=lam, **changes), instances, TOKENIZER)


def test_what_it_does_not_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="dataloader_drop_last would leave instances out"):
        config(tmp_path, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="type 'gptj'"):
        KPIGTrainer(make_model("gptj", vocab_size=len(TOKENIZER)), config(tmp_path), INSTANCES, TOKENIZER)
    monkeypatch.setattr(KPIGConfig, "n_gpu", 4)
    with pytest.raises(
        ValueError, match=r"4 GPUs in one process .*; start one process for each with accelerate launch"
    ):
        config(tmp_path)
