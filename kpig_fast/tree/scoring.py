"""One pass of a frozen model over many prompts with responses, laid out as token trees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from kpig_fast.ops.response_logprob import response_logprob
from kpig_fast.tree.layout import TokenTree, pack
from kpig_fast.tree.model import OutputHead, causal_lm, run_tree, tree_mode


@dataclass(frozen=True)
class Branch:
    """One prompt with a response to be scored.

    Args:
        ids: [L] token ids, prompt then response.
        start: index of the first response token.
        scored: how many leading response tokens are asked for their log-prob.
        keeps_hidden: also return the hidden states that predict the response, all of it.
    """

    ids: NDArray[np.int32]
    start: int
    scored: int
    keeps_hidden: bool = False


@dataclass(frozen=True)
class BranchScores:
    """``log_probs`` float32 [scored]; ``hidden`` [K, D] in the model's dtype where asked for. Both on the CPU."""

    log_probs: Tensor
    hidden: Tensor | None


@dataclass
class Layout:
    """Counts of what was laid out: trees, and tokens in them."""

    trees: int = 0
    tokens: int = 0


def score_branches(
    model: nn.Module, branches: Sequence[Branch], *, max_tokens: int, layout: Layout, progress: str | None = None
) -> list[BranchScores]:
    """Score every branch with ``model`` in evaluation mode and without gradient; the model is left as it was.

    Args:
        model: a causal language model that :func:`kpig_fast.tree.proof.prove` has accepted.
        branches: what to score.
        max_tokens: budget of one tree. When memory runs out, it is halved and the rest goes on.
        layout: counts the trees and tokens.
        progress: title of a progress bar; None shows none.

    Returns:
        One result a branch, in order.

    Raises:
        ValueError: a branch is longer than the model's positions.
    """
    _check_positions(model, branches)
    empty = BranchScores(torch.zeros(0), None)
    results = [empty] * len(branches)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), tree_mode(model), tqdm(
            total=len(branches), desc=progress, unit="branch", leave=None, disable=progress is None
        ) as bar:  # fmt: skip
            todo = list(range(len(branches)))
            while todo:
                try:
                    for index, scores in _run(model, branches, todo, max_tokens, layout):
                        results[index] = scores
                        bar.update()
                    break
                except torch.OutOfMemoryError:
                    if max_tokens <= 1:
                        raise
                    max_tokens //= 2
                    todo = [index for index in todo if results[index] is empty]
    finally:
        model.train(training)
    return results


def _run(
    model: nn.Module, branches: Sequence[Branch], todo: list[int], max_tokens: int, layout: Layout
) -> Iterator[tuple[int, BranchScores]]:
    device = causal_lm(model).device
    # A response token that nobody asks for needs no row.
    ends = [None if branches[i].keeps_hidden else branches[i].start + branches[i].scored for i in todo]
    sequences = [branches[i].ids[:end] for i, end in zip(todo, ends)]
    for tree in pack(sequences, [branches[i].start for i in todo], max_tokens=max_tokens):
        served = [todo[int(s)] for s in tree.sequences]
        yield from zip(served, _score_tree(model, tree, [branches[i] for i in served], device))
        layout.trees += 1
        layout.tokens += len(tree)


def _score_tree(
    model: nn.Module, tree: TokenTree, branches: list[Branch], device: torch.device
) -> Iterator[BranchScores]:
    scored_rows = torch.cat([tree.rows_of(i)[: branch.scored] for i, branch in enumerate(branches)]).to(device)
    target = np.concatenate([branch.ids[branch.start : branch.start + branch.scored] for branch in branches])
    targets = torch.from_numpy(target).long().to(device)

    def compute(hidden: Tensor, head: OutputHead) -> tuple[Tensor, Tensor]:
        rows = hidden.index_select(0, scored_rows)
        return response_logprob(rows, head.weight, targets, bias=head.bias, **head.transform), hidden

    log_probs, hidden = run_tree(model, tree.to(device), compute)
    log_probs = log_probs.float().cpu()
    start = 0
    for i, branch in enumerate(branches):
        kept = hidden.index_select(0, tree.rows_of(i).to(device)).cpu() if branch.keeps_hidden else None
        stop = start + min(branch.scored, len(branch.ids) - branch.start)
        yield BranchScores(log_probs[start:stop], kept)
        start = stop


def _check_positions(model: nn.Module, branches: Sequence[Branch]) -> None:
    limit = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    for index, branch in enumerate(branches):
        if limit is not None and len(branch.ids) - 1 > limit:
            raise ValueError(
                f"sequence {index} has {len(branch.ids)} tokens, but the model has {limit} positions; "
                "shorten its context or drop it"
            )
