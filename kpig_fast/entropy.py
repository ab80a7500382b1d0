"""Predictive entropy of a model's answers, of which replay by entropy (DynaInst) chooses the highest."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kpig_fast.data.encoding import EncodedPair
from kpig_fast.ops.reference import logits_reference
from kpig_fast.processes import whole
from kpig_fast.scorer import KeyPartScorer
from kpig_fast.tree.model import OutputHead, causal_lm, output_head
from kpig_fast.tree.scoring import Branch, Layout, score_branches

# Elements of logits at a time.
ELEMENTS = 2**24


def predictive_entropies(scorer: KeyPartScorer, pairs: Sequence[EncodedPair], *, progress: bool = False) -> list[float]:
    """Entropy of the next-token distribution under the complete instruction, in nats, a mean over the response tokens.

    Args:
        scorer: holds the model.
        pairs: instances as token ids, each with a response.
        progress: show a progress bar.

    Raises:
        ValueError: an instance is longer than the model's positions.
    """
    scorer.check_positions(pairs)
    branches = [
        Branch(np.array([*pair.complete_ids, *pair.response_ids], np.int32), len(pair.complete_ids), 0, True)
        for pair in pairs
    ]
    title = "measuring entropy" if progress else None
    scores = score_branches(scorer.model, branches, max_tokens=scorer.max_tokens, layout=Layout(), progress=title)
    device, head = causal_lm(scorer.model).device, output_head(scorer.model)
    head = replace(head, weight=whole(head.weight), bias=None if head.bias is None else whole(head.bias))
    return [float(_entropy(one.hidden.to(device), head).mean()) for one in scores]


@torch.no_grad()
def _entropy(hidden: Tensor, head: OutputHead) -> Tensor:
    """[N] of hidden states [N, D]."""
    rows = max(1, ELEMENTS // len(head.weight))
    return torch.cat([_entropy_of_logits(part, head) for part in hidden.split(rows)])


def _entropy_of_logits(hidden: Tensor, head: OutputHead) -> Tensor:
    bias = None if head.bias is None else head.bias.float()
    log_p = logits_reference(hidden.float(), head.weight.float(), bias, **head.transform).log_softmax(-1)
    # An impossible token adds 0, not 0 · inf.
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
