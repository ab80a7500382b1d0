"""One pass of a frozen model over many prompts with responses, laid out as token trees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from kpig_fast.ops.response_logprob import response_logprob
from kpig_fast.processes import gather, is_sharded
from kpig_fast.tree.layout import TokenTree, filler_tree, pack
from kpig_fast.tree.model import OutputHead, causal_lm, evaluation_mode, output_head, run_tree, tree_mode

# On a CPU the activations of trees of this size stay in the cache from one layer's operation to the next; that is worth
# this factor of repeated tokens.
CACHED_TOKENS = 2048
MORE_TOKENS = 1.05


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
    """``log_probs`` float32 [scored]; ``hidden`` in the model's dtype, [K, D] or, not asked for, [0, D]. On the CPU."""

    log_probs: Tensor
    hidden: Tensor


@dataclass
class Layout:
    """Counts of what was laid out: trees, and tokens in them."""

    trees: int = 0
    tokens: int = 0


def score_branches(
    model: nn.Module, branches: Sequence[Branch], *, max_tokens: int, layout: Layout, progress: str | None = None
) -> list[BranchScores]:
    """Score every branch with ``model`` in evaluation mode and without gradient; the model is left as it was.

    Where the model lies in pieces on several processes, each of them calls this with branches of its own, or none.

    Args:
        model: a causal language model that :func:`kpig_fast.tree.proof.prove` has accepted.
        branches: what to score.
        max_tokens: budget of one tree. When memory runs out, it is halved and the rest goes on; not where the model
            lies in pieces, because the processes would lose step.
        layout: counts the trees and tokens.
        progress: title of a progress bar; None shows none.

    Returns:
        One result a branch, in order.
    """
    # A tree serves no branch with an empty response.
    weight = output_head(model).weight
    nothing = BranchScores(torch.zeros(0), torch.empty(0, weight.shape[1], dtype=weight.dtype))
    results = {i: nothing for i, branch in enumerate(branches) if branch.start == len(branch.ids)}
    bar = tqdm(
        total=len(branches), initial=len(results), desc=progress, unit="branch", leave=None, disable=progress is None
    )
    with bar, evaluation_mode(model), tree_mode(model):
        while True:
            todo = [i for i in range(len(branches)) if i not in results]
            try:
                for index, scores in _run(model, branches, todo, max_tokens, layout):
                    results[index] = scores
                    bar.update()
                break
            except torch.OutOfMemoryError:
                if max_tokens <= 1 or is_sharded(model):
                    raise
                max_tokens //= 2
    return [results[i] for i in range(len(branches))]


def _run(
    model: nn.Module, branches: Sequence[Branch], todo: list[int], max_tokens: int, layout: Layout
) -> Iterator[tuple[int, BranchScores]]:
    device = causal_lm(model).device
    # A response token that nobody asks for needs no row.
    ends = [None if branches[i].keeps_hidden else branches[i].start + branches[i].scored for i in todo]
    sequences = [branches[i].ids[:end] for i, end in zip(todo, ends)]
    trees = _pack(sequences, [branches[i].start for i in todo], max_tokens, device)
    missing = max(gather([len(trees)])) - len(trees) if is_sharded(model) else 0
    for tree in trees:
        served = [todo[int(s)] for s in tree.sequences]
        yield from zip(served, _score_tree(model, tree, [branches[i] for i in served], device))
        layout.trees += 1
        layout.tokens += len(tree)
    for _ in range(missing):
        run_tree(model, filler_tree().to(device), lambda *_: ())


def _pack(
    sequences: list[NDArray[np.int32]], starts: list[int], max_tokens: int, device: torch.device
) -> list[TokenTree]:
    """As :func:`pack`; on a CPU in trees that its cache holds, unless that repeats many tokens."""
    trees = pack(sequences, starts, max_tokens=max_tokens)
    if device.type != "cpu" or max_tokens <= CACHED_TOKENS:
        return trees
    smaller = pack(sequences, starts, max_tokens=CACHED_TOKENS)
    tokens, more = (sum(map(len, each)) for each in (trees, smaller))
    return smaller if more <= MORE_TOKENS * tokens else trees


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
        kept = hidden.index_select(0, tree.rows_of(i)[: None if branch.keeps_hidden else 0].to(device)).cpu()
        stop = start + min(branch.scored, len(branch.ids) - branch.start)
        yield BranchScores(log_probs[start:stop], kept)
        start = stop
