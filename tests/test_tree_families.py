"""Every supported family on a token tree against its own forward on separate sequences: log-probs, loss, gradients."""

from pathlib import Path

import pytest
import torch
from families import (
    SUPPORTED,
    UNSUPPORTED,
    WINDOW,
    Branches,
    gradients,
    loss_of,
    make_branches,
    make_model,
    run_apart,
    run_together,
    worst_gradient_error,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from kpig_fast.tree import attention
from kpig_fast.tree.model import UnsupportedModelError, tree_mode
from kpig_fast.tree.proof import prove

BRANCHES = make_branches()

# Norms and rotations of many families are float32 inside a float64 model too.
NEARLY_EXACT = 1e-6


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every call of the tree's attention."""
    calls: list[int] = []
    own = attention.tree_attention

    def counted(query: Tensor, *args, **kwargs) -> Tensor:
        calls.append(query.shape[1])
        return own(query, *args, **kwargs)

    monkeypatch.setattr(attention, "tree_attention", counted)
    return calls


def apart(model: nn.Module, branches: Branches = BRANCHES) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs, loss and gradients of separate sequences."""
    log_probs = run_apart(model, branches)
    loss = loss_of(log_probs, branches)
    loss.backward()
    return log_probs.detach(), loss.detach(), gradients(model)


def together(model: nn.Module, branches: Branches = BRANCHES) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of a token tree."""
    with tree_mode(model):
        log_probs = run_together(model, branches)
        loss = loss_of(log_probs, branches)
        loss.backward()
    return log_probs.detach(), loss.detach(), gradients(model)


def assert_equal(found: tuple, exact: tuple, tolerance: float) -> None:
    """Log-probs, loss and every parameter's gradient agree up to a relative error."""
    assert float((found[0] - exact[0]).norm() / exact[0].norm()) <= tolerance
    assert float((found[1] - exact[1]).abs()) <= tolerance * float(exact[0].abs().sum())
    assert worst_gradient_error(found[2], exact[2]) <= tolerance


@pytest.mark.parametrize("family", SUPPORTED)
def test_equals_separate_sequences(family: str) -> None:
    assert min(map(len, BRANCHES.sequences)) > WINDOW
    assert prove(make_model(family)) < 1e-5
    exact = apart(make_model(family, dtype=torch.float64))
    assert len(exact[2]) >= 10
    assert_equal(together(make_model(family, dtype=torch.float64)), exact, NEARLY_EXACT)
    assert_equal(together(make_model(family)), exact, 1e-5)


@pytest.mark.parametrize("family", SUPPORTED)
def test_gradient_checkpointing(family: str, attention_calls: list[int]) -> None:
    model = make_model(family, dtype=torch.float64)
    exact = apart(model)
    model.gradient_checkpointing_enable()
    model.train()
    assert_equal(together(model), exact, NEARLY_EXACT)
    # Each of the two layers ran in the forward pass and again in the backward pass.
    assert len(attention_calls) == 4
    assert len(set(attention_calls)) == 1


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:The following")
@pytest.mark.parametrize("family", SUPPORTED)
def test_lora_adapter_on_all_projections(family: str) -> None:
    torch.manual_seed(1)
    adapters = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(make_model(family, dtype=torch.float64), adapters)
    with model.disable_adapter(), torch.no_grad():
        plain = run_apart(model, BRANCHES)
    exact = apart(model)
    assert float((exact[0] - plain).abs().max()) > 1e-2
    assert len(exact[2]) >= 8
    assert all("lora_" in name for name in exact[2])
    assert_equal(together(model), exact, NEARLY_EXACT)


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families_are_refused_by_name(family: str) -> None:
    model = make_model(family)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        with pytest.raises(UnsupportedModelError, match=f"type '{family}'"):
            prove(model)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def windowed() -> list[str]:
    return [family for family, options in SUPPORTED.items() if "sliding_window" in options]


@pytest.mark.parametrize("wrong", [{"sliding_window": None}, {"sliding_window": WINDOW + 1}, {"sliding_window": 4}])
@pytest.mark.parametrize("family", windowed())
def test_a_wrong_window_is_noticed(family: str, wrong: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention.tree_attention

    def changed(*args, **kwargs) -> Tensor:
        return own(*args, **{**kwargs, "window": wrong["sliding_window"] if kwargs["window"] else None})

    monkeypatch.setattr(attention, "tree_attention", changed)
    with pytest.raises(UnsupportedModelError, match="their logits differ from those of separate sequences"):
        prove(make_model(family))


@pytest.mark.parametrize(
    ("family", "dropped"), [("gemma2", "softcap"), ("gpt_oss", "sinks"), ("granite", "scale"), ("llama", "tree")]
)
def test_a_dropped_argument_is_noticed(family: str, dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention.tree_attention

    def changed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, positions: Tensor, **kwargs) -> Tensor:
        if dropped == "tree":
            ends = torch.full_like(ends, len(ends))
        return own(q, k, v, ends, positions, **{**kwargs, dropped: None} if dropped != "tree" else kwargs)

    monkeypatch.setattr(attention, "tree_attention", changed)
    with pytest.raises(UnsupportedModelError, match=f"type '{family}'"):
        prove(make_model(family))


def test_bfloat16_is_proved_within_its_rounding() -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    assert 1e-4 < prove(model) < 5e-2


def test_an_unusual_real_model(shared: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "bitllama-3M", dtype=torch.float32)
    assert model.config.model_type == "bitnet"
    prove(model)
    branches = make_branches(model.config.vocab_size)
    exact = run_apart(model, branches)
    with tree_mode(model):
        assert float((run_together(model, branches) - exact).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("vocabulary", [7, 64, 512, 1988, 4999, 50257])
def test_the_proof_holds_in_whatever_order_the_tree_lays_its_branches_out(vocabulary: int) -> None:
    assert prove(make_model("llama", vocab_size=vocabulary)) < 1e-5
