"""Compiling ahead what a model needs of the GPU kernels, so that no first step looks as if it hung."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

import torch
from torch import Tensor, nn

from kpig_fast.ops.linear_kpig_loss import linear_kpig_loss
from kpig_fast.ops.response_logprob import response_logprob
from kpig_fast.tree.layout import build
from kpig_fast.tree.model import OutputHead, causal_lm, run_tree, tree_mode

# After this many seconds a message says what is going on.
PATIENCE = 2.0


def warmup(model: nn.Module) -> None:
    """Run ``model`` forward and backward over a tiny token tree, so that every kernel that it needs is compiled.

    Compiled kernels are kept on disk (by Triton, in ``TRITON_CACHE_DIR``): later runs on the machine only load them.
    When it takes more than 2 seconds, a line on standard error says so. Weights and gradients stay as they are.

    Args:
        model: a Hugging Face causal language model, PEFT adapters included, on the device that it will run on.

    Raises:
        UnsupportedModelError: the model cannot run on a token tree.
    """
    lm = causal_lm(model)
    vocabulary = lm.config.get_text_config().vocab_size
    first, second = ([i % vocabulary for i in range(start, start + 24)] for start in (0, 16))
    tree = build([first + second, first + first], [24, 24]).to(lm.device)
    what = f"preparing a model of type {lm.config.model_type!r}; GPU kernels are compiled and kept for the next time"
    notice = Timer(PATIENCE, print, [f"kpig_fast: {what}"], {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        with _only_activations_have_gradients(model), tree_mode(model), torch.enable_grad():
            run_tree(model, tree, lambda hidden, head: _train(hidden, head, tree.rows)).backward()
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
    finally:
        notice.cancel()


def _train(hidden: Tensor, head: OutputHead, rows: Tensor) -> Tensor:
    """The loss of both branches; the scorer's path is run on the way."""
    taken, target = hidden[rows], rows % len(head.weight)
    options: dict[str, Any] = {"bias": head.bias, **head.transform}
    with torch.no_grad():
        response_logprob(taken, head.weight, target, **options)
    ones, ref_bias = torch.ones(len(rows), device=hidden.device), head.bias
    return linear_kpig_loss(
        taken, target, taken, taken.detach(), ones, head.weight, head.weight,
        ce_scale=1.0, jsd_scale=1.0, ref_bias=ref_bias, **options,
    ).loss  # fmt: skip


@contextmanager
def _only_activations_have_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, parameters take no gradient, but the embeddings of the input do: the backward pass costs no memory."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = causal_lm(model).get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
