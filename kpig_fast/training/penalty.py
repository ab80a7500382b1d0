"""The quadratic penalty on leaving the weights of the step before: plain (L2) or by Fisher information (EWC).

    penalty = strength / 2 · sum_i F_i (w_i - old_i)²        F = 1 for L2
    F = sum over the earlier steps of the mean over instances of (d log p(response) / d w)²

Old weights are those of the step before (online EWC: one anchor, not one for each step).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kpig_fast.data.encoding import EncodedPair
from kpig_fast.ops.response_logprob import response_logprob
from kpig_fast.training.batches import Forest, ForestCollator, TrainingExample
from kpig_fast.tree.model import OutputHead, causal_lm, evaluation_mode, run_tree, tree_mode


class QuadraticPenalty:
    """Adds its gradient to that of the loss; the sum of squares itself is never formed.

    Args:
        model: as it is now, the old weights; only what is trained is held.
        strength: factor on the penalty.
        importance: F of each trained parameter, by name; None: 1.
    """

    def __init__(self, model: nn.Module, strength: float, importance: Mapping[str, Tensor] | None = None) -> None:
        self.strength = strength
        self.anchors = [
            (p, p.detach().clone(), None if importance is None else importance[name].to(p.device, p.dtype))
            for name, p in model.named_parameters()
            if p.requires_grad
        ]

    @torch.no_grad()
    def add_gradient(self, loss_scale: float = 1.0) -> None:
        """Add ``strength · F (w - old)`` to the gradients; once an optimizer step, before they are clipped.

        Args:
            loss_scale: by how much the loss, and so its gradient, is scaled up (float16 training).
        """
        for p, old, importance in self.anchors:
            if p.grad is not None:
                drift = p - old
                p.grad.add_(drift if importance is None else drift.mul_(importance), alpha=self.strength * loss_scale)


def fisher_information(
    model: nn.Module, pairs: Sequence[EncodedPair], *, max_tokens: int, progress: bool = False
) -> dict[str, Tensor]:
    """Mean over instances of the squared gradient of log p(response), float32, for each trained parameter by name.

    Args:
        model: a causal language model that :func:`kpig_fast.tree.proof.prove` has accepted; left as it was.
        pairs: instances as token ids, at least one.
        max_tokens: budget of a token tree.
        progress: show a progress bar.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    collate = ForestCollator(max_tokens, masked=False)
    with evaluation_mode(model), tree_mode(model), torch.enable_grad():
        for pair in tqdm(pairs, desc="Fisher information", unit="instance", leave=None, disable=not progress):
            model.zero_grad()
            for forest in collate([TrainingExample(pair)])["forests"]:
                forest = forest.to(causal_lm(model).device)

                def log_prob(hidden: Tensor, head: OutputHead, forest: Forest = forest) -> Tensor:
                    rows = hidden.index_select(0, forest.rows)
                    return response_logprob(rows, head.weight, forest.target, bias=head.bias, **head.transform).sum()

                run_tree(model, forest.tree, log_prob).backward()
            for name, p in trained.items():
                if p.grad is not None:
                    total[name].addcmul_(p.grad.float(), p.grad.float(), value=1 / len(pairs))
    model.zero_grad()
    return total
