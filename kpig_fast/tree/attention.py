"""The attention that Hugging Face layers call while a model runs on a token tree.

It is registered under one name with transformers' attention interface, together with a mask function that only tells
the window: the tree's arrays say the rest. They travel as keyword arguments of the model's forward, because those
(unlike a global) are still there when gradient checkpointing runs a layer again in the backward pass.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from kpig_fast.ops.tree_attention import tree_attention
from kpig_fast.tree.layout import TokenTree

IMPLEMENTATION = "kpig_tree"
SUBTREE_END, POSITION_IDS, ROWS = "tree_subtree_end", "tree_position_ids", "tree_rows"


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
    # Not every windowed layer names its window to its attention, but every one hands on its mask.
    windows = [sliding_window, None if attention_mask is None else attention_mask.shape[-1]]
    out = tree_attention(
        query[0],
        key[0],
        value[0],
        kwargs[SUBTREE_END],
        kwargs[POSITION_IDS],
        scale=scaling,
        window=min((window for window in windows if window is not None), default=None),
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(0, 1)[None], None


def _mask(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> Tensor | None:
    """What a layer gets as its mask: a tensor (of one element) as wide as its window, nothing without a window."""
    if use_vmap:
        raise ValueError("the model combines causal attention with a mask of its own, which a token tree does not know")
    return None if local_size is None else torch.empty(1).expand(1, 1, 1, local_size)


def tree_arguments(tree: TokenTree) -> dict[str, Tensor]:
    """The keyword arguments that carry a tree from a model's forward to its layers."""
    return {SUBTREE_END: tree.subtree_end, POSITION_IDS: tree.position_ids, ROWS: tree.rows.unique()}


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
