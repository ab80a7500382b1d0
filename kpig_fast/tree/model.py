"""Running a Hugging Face causal language model on a token tree, without any code of that model.

Inside ``tree_mode(model)`` the model's attention is the tree's, and its ``forward`` takes a tree and a function of the
hidden states, which runs as the forward of the head. So wrappers that act there (DDP, FSDP, mixed precision, PEFT) see
everything, and a head that lies in pieces on several processes is whole while it is used. Afterwards the model is as it
was: it generates and answers as before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kpig_fast.tree.attention import IMPLEMENTATION, tree_arguments
from kpig_fast.tree.last_layer import only_rows_read
from kpig_fast.tree.layout import TokenTree

Result = TypeVar("Result")


class UnsupportedModelError(ValueError):
    """The model cannot run on a token tree, or has not been shown to."""


@dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits: ``cap((hidden @ weight.T + bias) · logit_scale)``.

    ``weight`` [V, D], ``bias`` [V] or None, ``softcap`` as in Gemma 2, ``logit_scale`` as in Cohere and Granite.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def transform(self) -> dict[str, Any]:
        """The keyword arguments ``softcap`` and ``logit_scale`` of the operators over the vocabulary."""
        return {"softcap": self.softcap, "logit_scale": self.logit_scale}


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside ``model``, which may carry PEFT adapters.

    Raises:
        UnsupportedModelError: no causal language model, or adapters that add tokens instead of weights.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None:
        if config.is_prompt_learning:
            raise UnsupportedModelError(
                f"PEFT method {config.peft_type.value} adds virtual tokens, which a token tree has no place for; "
                "use adapters of weights such as LoRA"
            )
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no Hugging Face model with a language-model head; "
            "load it with AutoModelForCausalLM"
        )
    return model


def output_head(model: nn.Module) -> OutputHead:
    """The head of ``model``, with the scale and soft-cap that its config names.

    Raises:
        UnsupportedModelError: the head is not one plain weight matrix (an adapter on it, or a quantized one).
    """
    lm = causal_lm(model)
    layer = lm.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if hasattr(layer, "base_layer") or weight is None or weight.dim() != 2 or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"the head of {lm.config.model_type!r} is a {type(layer).__name__} (an adapter or a quantized layer), not "
            "one plain weight matrix; leave it out of the adapter's target_modules and of quantization, or train it "
            'whole with modules_to_save=["lm_head"]'
        )
    config = lm.config.get_text_config()
    if len(weight) < config.vocab_size:
        raise UnsupportedModelError(
            f"the head of {lm.config.model_type!r} holds {len(weight)} of {config.vocab_size} vocabulary entries here: "
            "the rest is on other processes; load the model without tensor parallelism, or gather the head first"
        )
    scale = getattr(config, "logit_scale", None) or 1.0
    return OutputHead(
        weight=weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=scale / (getattr(config, "logits_scaling", None) or 1.0),
    )


def position_limit(model: nn.Module) -> int | None:
    """How many positions a sequence on a token tree may have; None without a limit.

    A LongRoPE model computes every position otherwise as soon as one of them passes its original context: up to there,
    a sequence does not depend on what else a tree holds.
    """
    config = causal_lm(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    long = [one for one in (rope, *by_layer_type) if one.get("rope_type") == "longrope"]
    limits = [getattr(config, "max_position_embeddings", None)]
    limits += [one.get("original_max_position_embeddings") for one in long]
    return min((limit for limit in limits if limit is not None), default=None)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; afterwards every module has its own training flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
            # FSDP leaves the head whole until a backward pass, which does not come; its pieces are the parameters.
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]


@contextmanager
def tree_mode(model: nn.Module) -> Iterator[None]:
    """Inside, call the model with :func:`run_tree`; afterwards its own attention and forward are back.

    Raises:
        UnsupportedModelError: the model's class does not let its attention be chosen.
    """
    lm = causal_lm(model)
    before = str(lm.config._attn_implementation)
    if before == IMPLEMENTATION:
        yield
        return
    if not lm._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"models of type {lm.config.model_type!r} have attention code of their own, which cannot be replaced; "
            "a token tree needs a model that uses transformers' attention interface"
        )
    head: nn.Module = lm.get_output_embeddings()  # type: ignore[assignment]

    def forward(*_: Any, tree: TokenTree, compute: Callable[[Tensor, OutputHead], Any], **__: Any) -> Any:
        return head(_hidden_states(lm, tree), compute)

    def head_forward(hidden: Tensor, compute: Callable[[Tensor, OutputHead], Any]) -> Any:
        return compute(hidden, output_head(lm))

    lm.set_attn_implementation(IMPLEMENTATION)
    try:
        with only_rows_read(lm), _replaced_forward(lm, forward), _replaced_forward(head, head_forward):
            yield
    finally:
        lm.set_attn_implementation(before)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        # Not del: a wrapper may have taken it away again.
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


def run_tree(model: nn.Module, tree: TokenTree, compute: Callable[[Tensor, OutputHead], Result]) -> Result:
    """``compute(hidden [T, D], head)`` inside the model's forward over ``tree``; only inside :func:`tree_mode`.

    Only the rows ``tree.rows`` of ``hidden`` are hidden states; the model leaves out what no one reads.
    """
    return model(input_ids=tree.input_ids[None].long(), tree=tree, compute=compute)


def _hidden_states(lm: PreTrainedModel, tree: TokenTree) -> Tensor:
    """[T, D]: the last hidden states, each token having seen its ancestors only; of use at ``tree.rows`` alone."""
    out = lm.base_model(
        input_ids=tree.input_ids[None].long(),
        position_ids=tree.position_ids[None].long(),
        use_cache=False,
        **tree_arguments(tree),
    )
    return out.last_hidden_state[0]
