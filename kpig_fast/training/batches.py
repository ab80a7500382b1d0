"""From encoded instances to forests: the sampler that keeps instructions together, and the collator.

Both branches of an instance stand on their own (the loss is a sum), so a micro-batch is packed freely into token trees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from kpig_fast.data.encoding import EncodedPair
from kpig_fast.tree.layout import TokenTree, pack


@dataclass(frozen=True)
class TrainingExample:
    """One training instance.

    Args:
        pair: its token ids.
        group: instances of one instruction have the same number.
        temperature: beta of its divergence.
        teacher_row: where its masked response starts among the teacher's hidden states.
    """

    pair: EncodedPair
    group: int
    temperature: float = 1.0
    teacher_row: int = 0


@dataclass(frozen=True)
class Forest:
    """A token tree with what the loss reads from it.

    ``rows`` [N] and ``target`` [N]: complete rows and their next tokens. ``masked_rows`` [M], ``teacher_rows`` [M] and
    ``temperature`` [M]: masked rows, the teacher's rows for them, and beta.
    """

    tree: TokenTree
    rows: Tensor
    target: Tensor
    masked_rows: Tensor
    teacher_rows: Tensor
    temperature: Tensor

    def to(self, device: torch.device | str) -> "Forest":
        """The same forest on ``device``; the teacher's rows stay on the CPU, where the teacher is."""
        moved = {name: getattr(self, name).to(device) for name in ("tree", "rows", "target", "masked_rows")}
        return replace(self, temperature=self.temperature.to(device), **moved)


class ForestCollator:
    """Packs the instances of a micro-batch into forests of at most ``max_tokens`` tokens.

    Args:
        max_tokens: budget of one forest; each is one forward and backward pass.
        masked: lay out the masked branch too.
    """

    def __init__(self, max_tokens: int, *, masked: bool) -> None:
        self.max_tokens = max_tokens
        self.masked = masked

    def __call__(self, examples: Sequence[TrainingExample]) -> dict[str, Any]:
        """``forests``: list of :class:`Forest`; ``n_items``: response tokens of the complete instances."""
        complete = [[*e.pair.complete_ids, *e.pair.response_ids] for e in examples]
        masked = [[*e.pair.masked_ids, *e.pair.response_ids] for e in examples] if self.masked else []
        starts = [len(e.pair.complete_ids) for e in examples]
        starts += [len(e.pair.masked_ids) for e in examples] if self.masked else []
        trees = pack([*complete, *masked], starts, max_tokens=self.max_tokens)
        return {
            "forests": [_forest(tree, examples) for tree in trees],
            "n_items": torch.tensor(sum(len(e.pair.response_ids) for e in examples)),
        }


def _forest(tree: TokenTree, examples: Sequence[TrainingExample]) -> Forest:
    no_rows = torch.empty(0, dtype=torch.int64)
    rows, target, masked_rows, teacher_rows = [no_rows], [no_rows], [no_rows], [no_rows]
    temperature = [torch.empty(0)]
    for i, sequence in enumerate(tree.sequences.tolist()):
        example = examples[sequence % len(examples)]
        length = len(example.pair.response_ids)
        if sequence < len(examples):
            rows.append(tree.rows_of(i))
            target.append(torch.tensor(example.pair.response_ids))
        else:
            masked_rows.append(tree.rows_of(i))
            teacher_rows.append(torch.arange(example.teacher_row, example.teacher_row + length))
            temperature.append(torch.full((length,), example.temperature))
    return Forest(
        tree=tree,
        rows=torch.cat(rows),
        target=torch.cat(target),
        masked_rows=torch.cat(masked_rows),
        teacher_rows=torch.cat(teacher_rows),
        temperature=torch.cat(temperature),
    )


class GroupedSampler(Sampler[int]):
    """A seeded shuffle in which the instances of one instruction stand together inside each optimizer batch.

    Which instances form an optimizer batch is decided by the shuffle alone; only their order inside it is by group.

    Args:
        groups: group of every instance.
        batch: instances of one optimizer batch, over all micro-batches and ranks.
        seed: together with the epoch, seeds the shuffle.
    """

    def __init__(self, groups: Sequence[int], batch: int, seed: int) -> None:
        self.groups = np.asarray(groups)
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew for ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.groups))
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            yield from part[np.argsort(self.groups[part], kind="stable")].tolist()
