"""The attention that Hugging Face layers call while a model runs on a token tree.

It is registered under one name with transformers' attention interface, together with a mask function that builds
nothing: the tree's arrays say it all. They travel as keyword arguments of the model's forward, because those (unlike a
global) are still there when gradient checkpointing runs a layer again in the backward pass.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kpig_fast.ops.tree_attention import tree_attention

IMPLEMENTATION = "kpig_tree"
SUBTREE_END, POSITION_IDS = "tree_subtree_end", "tree_position_ids"


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, Hkv, T, d]
    value: Tensor,  # [1, Hkv, T, d]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a layer gets back: [1, T, H, d], and no attention weights."""
    if SUBTREE_END not in kwargs:
        raise ValueError(
            f"{type(module).__name__} did not pass the token tree on to its attention: its model drops keyword "
            "arguments between forward and the layers, so it cannot run on a token tree"
        )
    if dropout:
        warnings.warn(
            f"attention dropout {dropout} is not applied on a token tree; set it to 0 in the model's config "
            "to silence this warning",
            stacklevel=2,
        )
    out = tree_attention(
        query[0],
        key[0],
        value[0],
        kwargs[SUBTREE_END],
        kwargs[POSITION_IDS],
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(0, 1)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def tree_arguments(subtree_end: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    """The keyword arguments that carry a tree from a model's forward to :func:`_attention`."""
    return {SUBTREE_END: subtree_end, POSITION_IDS: position_ids.to(torch.int32)}


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
