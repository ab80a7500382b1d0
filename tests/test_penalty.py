"""The quadratic penalty against autograd, inside the trainer too; the Fisher information against its definition."""

import copy

import pytest
import torch
from training_cases import INSTANCES, TOKENIZER, config, tiny, weights

from kpig_fast import KeyPartScorer, KPIGTrainer
from kpig_fast.training.penalty import QuadraticPenalty, fisher_information


def drifted(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its weights moved and a gradient on each."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_formula(weighted: bool) -> None:
    model = tiny(dtype=torch.float64)
    next(model.parameters()).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    importance = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
    old = copy.deepcopy(model)
    penalty = QuadraticPenalty(model, 0.7, importance if weighted else None)
    drifted(model)
    expected = {}
    for (name, p), q in zip(model.named_parameters(), old.parameters()):
        w = p.detach().clone().requires_grad_()
        ((importance[name] if weighted else 1.0) * (w - q.detach()) ** 2).sum().mul(0.7 / 2).backward()
        expected[name] = p.grad + w.grad if p.requires_grad else p.grad.clone()
    penalty.add_gradient()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_a_scaled_loss_scales_it() -> None:
    model = tiny()
    penalty = QuadraticPenalty(model, 0.5)
    drifted(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    penalty.add_gradient()
    once = {name: p.grad - before[name] for name, p in model.named_parameters()}
    for p, (name, _) in zip(model.parameters(), before.items()):
        p.grad = before[name].clone()
    penalty.add_gradient(loss_scale=8.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad - before[name], 8 * once[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}])
def test_the_trainer_adds_it_once_an_optimizer_step(changes: dict, tmp_path) -> None:
    strength, rate = 0.4, 0.05
    free, held = tiny(), tiny()
    old = weights(held)
    for model, penalty in ((free, None), (held, QuadraticPenalty(held, strength))):
        args = config(tmp_path, lam=0.0, learning_rate=rate, max_steps=1, **changes)
        trainer = KPIGTrainer(model, args, INSTANCES, TOKENIZER)
        trainer.penalty = penalty
        # Away from the old weights, so that there is something to pull back.
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        trainer.train()
    for name, p in held.state_dict().items():
        pulled = rate * strength * 0.01
        torch.testing.assert_close(p, free.state_dict()[name] - pulled, rtol=1e-4, atol=1e-6, msg=name)
    assert not all(torch.equal(weight, held.state_dict()[name]) for name, weight in old.items())


def test_fisher_information_is_the_mean_square_of_single_gradients() -> None:
    model = tiny(dtype=torch.float64).train()
    model.model.embed_tokens.requires_grad_(False)
    pairs = KeyPartScorer(model, TOKENIZER).encoder.encode_all(INSTANCES[:3])
    # A small budget cuts an instance's tree, which changes nothing.
    found = fisher_information(model, pairs, max_tokens=16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    for pair in pairs:
        ids = torch.tensor([[*pair.complete_ids, *pair.response_ids]])
        log_p = model(input_ids=ids).logits[0, len(pair.complete_ids) - 1 : -1].log_softmax(-1)
        total = log_p.gather(1, torch.tensor(pair.response_ids)[:, None]).sum()
        for (name, _), gradient in zip(trained.items(), torch.autograd.grad(total, list(trained.values()))):
            expected[name] += gradient**2 / len(pairs)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-12, msg=name)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
