"""warmup runs what training and scoring run, says so when it takes long, and leaves the model as it was."""

import time

import pytest
import torch
from families import make_model
from peft import LoraConfig, get_peft_model

from kpig_fast import warmup
from kpig_fast.ops.log import took
from kpig_fast.tree import warmup as warmup_module
from kpig_fast.tree.model import UnsupportedModelError


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_every_path_runs_and_the_model_stays(family: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model(family).train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    took.cache_clear()
    warmup(model)
    # Attention, tiles, whole rows of one side and of two.
    assert took.cache_info().currsize == 4
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert not any(m._forward_hooks for m in model.modules())
    assert not capfd.readouterr().err


def test_adapters() -> None:
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj", "down_proj"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    warmup(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert all(p.grad is None for p in model.parameters())


def test_says_so_when_it_takes_long(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    own = warmup_module.run_tree

    def slow(*args):
        time.sleep(0.3)
        return own(*args)

    monkeypatch.setattr(warmup_module, "run_tree", slow)
    monkeypatch.setattr(warmup_module, "PATIENCE", 0.05)
    warmup(make_model("llama"))
    assert "preparing a model of type 'llama'" in capfd.readouterr().err


def test_a_model_without_trees_is_refused_and_stays() -> None:
    model = make_model("bloom")
    with pytest.raises(UnsupportedModelError, match="bloom"):
        warmup(model)
    assert all(p.requires_grad for p in model.parameters())
