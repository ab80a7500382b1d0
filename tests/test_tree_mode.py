"""What tree mode does to a model, that it is undone, and what is refused before any number comes out."""

from collections.abc import Iterator

import pytest
import torch
from families import make_branches, make_model, run_apart, run_together
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from kpig_fast.tree.attention import IMPLEMENTATION
from kpig_fast.tree.layout import build
from kpig_fast.tree.model import (
    OutputHead,
    UnsupportedModelError,
    causal_lm,
    evaluation_mode,
    output_head,
    position_limit,
    run_tree,
    tree_mode,
)
from kpig_fast.tree.proof import prove

BRANCHES = make_branches()
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 20,
}


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


def answers(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits of the model's own forward, and a generated continuation."""
    ids = torch.tensor([[5, 9, 40, 7, 9, 11]])
    with torch.no_grad():
        continued = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)  # type: ignore[operator]
        return model(input_ids=ids).logits, continued


def assert_as_before(model: nn.Module, before: tuple[Tensor, Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(answers(model), before))


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_the_model_is_as_before(model: PreTrainedModel, own: str) -> None:
    model.set_attn_implementation(own)
    before = answers(model)
    with tree_mode(model):
        assert model.config._attn_implementation == IMPLEMENTATION
        run_together(model, BRANCHES)
    assert model.config._attn_implementation == own
    assert "forward" not in vars(model)
    assert_as_before(model, before)
    prove(model)
    assert_as_before(model, before)


def test_the_model_is_as_before_after_an_error(model: PreTrainedModel) -> None:
    before = answers(model)
    with pytest.raises(ZeroDivisionError), tree_mode(model):
        raise ZeroDivisionError
    assert_as_before(model, before)

    def fails(hidden: Tensor, head: OutputHead) -> None:
        raise KeyError("inside the model's forward")

    with pytest.raises(KeyError), tree_mode(model):
        run_tree(model, build(BRANCHES.sequences, BRANCHES.starts), fails)
    assert_as_before(model, before)
    assert "forward" not in vars(model)


def test_a_forward_of_its_own_comes_back(model: PreTrainedModel) -> None:
    own = model.forward

    def hooked(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = hooked  # type: ignore[method-assign]
    before = answers(model)
    with tree_mode(model):
        run_together(model, BRANCHES)
    assert model.forward is hooked
    assert_as_before(model, before)


def test_nested_use(model: PreTrainedModel) -> None:
    before = answers(model)
    with tree_mode(model):
        outside = run_together(model, BRANCHES)
        with tree_mode(model):
            inside = run_together(model, BRANCHES)
        again = run_together(model, BRANCHES)
    assert torch.equal(outside, inside)
    assert torch.equal(outside, again)
    assert_as_before(model, before)


def test_saved_inside_tree_mode_without_a_trace(model: PreTrainedModel, tmp_path) -> None:
    with tree_mode(model):
        model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text("utf-8")
    assert "kpig" not in (tmp_path / "config.json").read_text("utf-8")


@pytest.mark.parametrize("training", [False, True])
def test_proof_and_evaluation_mode_restore_every_training_flag(model: PreTrainedModel, training: bool) -> None:
    model.train(training)
    model.model.layers[0].train(not training)  # type: ignore[union-attr]
    flags = [module.training for module in model.modules()]
    prove(model)
    assert [module.training for module in model.modules()] == flags
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()


def test_proof_does_not_touch_gradients_or_random_state(model: PreTrainedModel) -> None:
    state = torch.get_rng_state()
    assert prove(model) < 1e-5
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_dropout_warns() -> None:
    model = make_model("llama", attention_dropout=0.1)
    model.train()
    with tree_mode(model), pytest.warns(UserWarning, match=r"attention dropout 0\.1 is not applied on a token tree"):
        run_together(model, BRANCHES)


def test_gradient_reaches_the_body_only_where_it_is_trained(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_()  # type: ignore[union-attr]
    with tree_mode(model):
        run_together(model, BRANCHES).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]


# What is refused


def refused(model: nn.Module, message: str) -> None:
    """``prove`` refuses the model and leaves it alone."""
    with pytest.raises(UnsupportedModelError, match=message):
        prove(model)


def test_prompt_learning_is_refused(model: PreTrainedModel) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    refused(get_peft_model(model, prompts), "PROMPT_TUNING adds virtual tokens, which a token tree has no place for")
    prefixes = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    refused(get_peft_model(make_model("llama"), prefixes), "PREFIX_TUNING adds virtual tokens")


def test_an_adapter_on_the_head_is_refused(model: PreTrainedModel) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    refused(
        adapted,
        r"the head of 'llama' is a Linear \(an adapter .*\), not one plain weight matrix; leave it out of the adapter",
    )


def test_a_quantized_head_is_refused(model: PreTrainedModel) -> None:
    class Int8Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(97, 32, dtype=torch.int8), requires_grad=False)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ self.weight.float().t()

    model.set_output_embeddings(Int8Head())
    refused(model, "is a Int8Head .*, not one plain weight matrix; leave it out of .* quantization")


def test_a_part_of_a_head_is_refused(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight[:40].detach())
    refused(model, "the head of 'llama' holds 40 of 97 vocabulary entries here.*without tensor parallelism")


def test_a_head_that_is_trained_beside_an_adapter_is_proved(model: PreTrainedModel) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-2)
    assert prove(adapted) < 1e-5
    with tree_mode(adapted):
        found = run_together(adapted, BRANCHES)
        found.sum().backward()
    torch.testing.assert_close(found, run_apart(adapted, BRANCHES), rtol=1e-4, atol=1e-5)
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert any("lm_head.modules_to_save" in name for name in trained)


def test_what_is_no_causal_model_is_refused(model: PreTrainedModel) -> None:
    refused(nn.Linear(2, 2), "Linear is no Hugging Face model with a language-model head; load it with AutoModelForC")
    refused(AutoModel.from_config(model.config), "LlamaModel is no Hugging Face model with a language-model head")


def test_chunked_attention_is_refused() -> None:
    model = make_model("llama")
    model.config.attention_chunk_size = 8192
    refused(model, "'llama' cut their attention into chunks by position")


def test_a_wrong_scale_of_the_logits_is_noticed() -> None:
    model = make_model("llama")
    model.config.logit_scale = 0.5
    refused(model, "'llama' cannot run on a token tree: their logits differ from those of separate sequences")


def test_nan_weights_are_refused(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)  # type: ignore[union-attr]
    refused(model, "relative error nan")


# Heads and positions


def test_heads() -> None:
    assert output_head(make_model("llama")).transform == {"softcap": None, "logit_scale": 1.0}
    assert output_head(make_model("gemma2")).softcap == 1.0
    assert output_head(make_model("granite")).logit_scale == 0.5
    assert output_head(make_model("cohere")).logit_scale == 0.5
    phi = make_model("phi")
    assert output_head(phi).bias is phi.lm_head.bias  # type: ignore[union-attr]
    tied = make_model("gpt2")
    assert output_head(tied).weight is tied.transformer.wte.weight  # type: ignore[union-attr]


def test_the_model_inside_wrappers(model: PreTrainedModel) -> None:
    assert causal_lm(model) is model
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert causal_lm(adapted) is model


def test_position_limits() -> None:
    assert position_limit(make_model("llama")) == 128
    assert position_limit(make_model("gpt2")) == 128
    assert position_limit(make_model("gemma3_text")) == 128
    unlimited = make_model("bloom")
    del unlimited.config.max_position_embeddings
    assert position_limit(unlimited) is None


@pytest.fixture
def long_rope() -> Iterator[PreTrainedModel]:
    return make_model("phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=20)


def test_long_rope_is_limited_to_its_original_context(long_rope: PreTrainedModel) -> None:
    assert position_limit(long_rope) == 20
    prove(long_rope)

    def differences(vocabulary_shift: int) -> Tensor:
        sequences = [list(range(5, 25)), [*range(5, 12), *range(30, 30 + vocabulary_shift)]]
        with tree_mode(long_rope), torch.no_grad():
            tree = build(sequences, [1, 1])
            on_tree = run_tree(long_rope, tree, lambda hidden, head: hidden @ head.weight.T)[tree.rows_of(0)]
        with torch.no_grad():
            alone = long_rope(input_ids=torch.tensor([sequences[0][:-1]])).logits[0]
        return (on_tree - alone).abs().max()

    # A longer neighbour changes a sequence's rotation: the reason for the limit.
    assert float(differences(14)) < 1e-4
    assert float(differences(15)) > 1e-2
