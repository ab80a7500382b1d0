"""From encoded instances to forests: the sampler that makes micro-batches, and the collator that lays them out.

Both branches of an instance stand on their own (the loss is a sum), so a micro-batch is packed freely into token trees.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kpig_fast.data.encoding import EncodedPair
from kpig_fast.training.balance import balanced_bins
from kpig_fast.tree.layout import TokenTree, filler_tree, pack


@dataclass(frozen=True)
class TrainingExample:
    """One training instance.

    Args:
        pair: its token ids.
        temperature: beta of its divergence.
        teacher_row: where its masked response starts among the teacher's hidden states.
    """

    pair: EncodedPair
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
        """Lay out ``examples``, of which there may be none.

        Returns:
            ``forests``: list of :class:`Forest`. As int64 scalars: ``n_items``, response tokens of the complete
            instances; ``n_tokens``, their prompts included, as plain fine-tuning without padding reads them;
            ``n_instances``. To lay them out again with a smaller budget: ``examples`` and ``max_tokens``.
        """
        complete = [[*e.pair.complete_ids, *e.pair.response_ids] for e in examples]
        masked = [[*e.pair.masked_ids, *e.pair.response_ids] for e in examples] if self.masked else []
        starts = [len(e.pair.complete_ids) for e in examples]
        starts += [len(e.pair.masked_ids) for e in examples] if self.masked else []
        n_items = sum(len(e.pair.response_ids) for e in examples)
        trees = pack([*complete, *masked], starts, max_tokens=self.max_tokens)
        return {
            "forests": [_forest(tree, examples) for tree in trees],
            "n_items": torch.tensor(n_items),
            "n_tokens": torch.tensor(n_items + sum(len(e.pair.complete_ids) for e in examples)),
            "n_instances": torch.tensor(len(examples)),
            "examples": examples,
            "max_tokens": self.max_tokens,
        }


def filler_forest() -> Forest:
    """A forest whose loss is 0, with zero gradients: for a process that has fewer forests than the others."""
    return _forest(filler_tree(), [])


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


class BalancedBatches(Sampler[list[int]]):
    """The micro-batches of one process: lists of instance indices whose token trees have nearly the same size.

    Which instances form an optimizer batch is decided by a seeded shuffle alone, so any cut of the same number of
    instances into micro-batches and processes trains the same. The last optimizer batch of an epoch holds the rest in
    as few micro-batches as it needs; a micro-batch is empty only where there are fewer instances than micro-batches.

    Args:
        pairs: token ids of every instance.
        micro_batch: instances of a micro-batch, on average.
        accumulation: micro-batches of an optimizer batch on each process.
        processes: number of processes.
        rank: which of them this is, from 0.
        seed: together with the epoch, seeds the shuffle.
        masked: the trees hold the masked branch too.
    """

    def __init__(
        self,
        pairs: Sequence[EncodedPair],
        *,
        micro_batch: int,
        accumulation: int,
        processes: int,
        rank: int,
        seed: int,
        masked: bool,
    ) -> None:
        self.pairs = pairs
        self.abreast = micro_batch * processes
        self.accumulation = accumulation
        self.processes = processes
        self.rank = rank
        self.seed = seed
        self.masked = masked
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew for ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of an epoch, the same on every process."""
        return math.ceil(len(self.pairs) / self.abreast)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.pairs)).tolist()
        batch = self.abreast * self.accumulation
        for start in range(0, len(order), batch):
            yield from self._micro_batches(order[start : start + batch])

    def _micro_batches(self, members: list[int]) -> Iterator[list[int]]:
        steps = math.ceil(len(members) / self.abreast)
        bins = balanced_bins([self.pairs[i] for i in members], steps * self.processes, masked=self.masked)
        for step in range(steps):
            # Bins come by size: those of one step are alike, and who has its largest has the next one's smallest.
            place = self.rank if step % 2 == 0 else self.processes - 1 - self.rank
            yield [members[i] for i in bins[step * self.processes + place]]


class ShuffleByEpoch(TrainerCallback):
    """Tells the batches their epoch; not every release of transformers does, behind a resumption."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["train_dataloader"].batch_sampler.set_epoch(int(state.epoch or 0))
