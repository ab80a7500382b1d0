"""What a run would train, in figures, and as text for a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from math import ceil
from typing import NamedTuple

import numpy as np

from kpig_fast.training.run_config import StrategyName
from kpig_fast.training.sizing import Memory
from kpig_fast.training.strategies import STRATEGIES

_BINS, _BAR = 10, 40


class TreeSize(NamedTuple):
    """One token tree: its tokens, the rows of both branches, and how many tokens one attends to on average."""

    tokens: int
    complete_rows: int
    masked_rows: int
    depth: float


@dataclass(frozen=True)
class StepSize:
    """What one time step would train.

    Args:
        tasks: its new tasks.
        lengths: tokens of prompt and response of each of their instances.
        replayed: those of each earlier instance.
        apart: tokens of an epoch with every branch on its own.
        trees: the token trees of an epoch.
        updates: optimizer steps, of all epochs.
        epochs: how often everything is trained.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    replayed: tuple[int, ...]
    apart: int
    trees: tuple[TreeSize, ...]
    updates: int
    epochs: float

    @property
    def plain(self) -> int:
        """Tokens of an epoch of plain fine-tuning on the same instances, without padding."""
        return sum(self.lengths) + sum(self.replayed)

    @property
    def tokens(self) -> int:
        """Tokens of an epoch on token trees."""
        return sum(tree.tokens for tree in self.trees)


@dataclass(frozen=True)
class Forecast:
    """What a run would do; ``to_text`` says it.

    Args:
        data: what of the data was kept and dropped, and why.
        strategy: its name.
        distils: the divergence is trained, so that trees have a masked branch.
        steps: the time steps.
        memory: bytes of one process at the largest tree.
        flops: operations of training and of its pre-passes, all processes together.
        flops_per_second: what matrix products of this model reach here, all processes together.
        device: where that was measured.
    """

    data: str
    strategy: StrategyName
    distils: bool
    steps: tuple[StepSize, ...]
    memory: Memory
    flops: float
    flops_per_second: float
    device: str

    @property
    def seconds(self) -> float:
        """Lower bound of the time of training."""
        return self.flops / self.flops_per_second

    def to_text(self) -> str:
        """All of it, for a terminal."""
        parts = (self._steps(), self._lengths(), self._tokens(), self._memory(), self._time())
        return "\n\n".join([self.data, *("\n".join(lines) for lines in parts)])

    def _steps(self) -> Iterator[str]:
        yield f"{len(self.steps)} steps, strategy {self.strategy}"
        yield f"{'step':>6}{'instances':>11}{'replayed':>10}{'updates':>9}  tasks"
        for n, step in enumerate(self.steps, start=1):
            rest = f" and {len(step.tasks) - 3} more" if len(step.tasks) > 3 else ""
            counts = f"{n:>6}{len(step.lengths):>11,}{len(step.replayed):>10,}{step.updates:>9,}"
            yield f"{counts}  {', '.join(step.tasks[:3])}{rest}"

    def _lengths(self) -> Iterator[str]:
        lengths = np.array([length for step in self.steps for length in step.lengths])
        least, median, most, longest = np.quantile(lengths, (0, 0.5, 0.95, 1), method="inverted_cdf")
        yield f"tokens of prompt and response: min {least}, median {median}, 95 % {most}, max {longest}"
        edges = np.unique(np.linspace(least, longest + 1, _BINS + 1).astype(int))
        counts, _ = np.histogram(lengths, edges)
        for first, end, count in zip(edges, edges[1:], counts):
            yield f"  {first:>6} – {end - 1:<6}{count:>10,}  {'#' * ceil(_BAR * count / counts.max())}".rstrip()

    def _tokens(self) -> Iterator[str]:
        plain, apart, tokens = (sum(getattr(s, name) for s in self.steps) for name in ("plain", "apart", "tokens"))
        yield "tokens of one epoch of all steps"
        yield f"  {'plain fine-tuning':<30}{plain:>14,}"
        saved = f"{tokens / plain:.2f} × plain fine-tuning"
        if self.distils:
            yield f"  {'both instructions, apart':<30}{apart:>14,}"
            saved += f", {tokens / apart:.2f} × apart"
        name = f"{'both instructions' if self.distils else 'the same'}, token tree"
        yield f"  {name:<30}{tokens:>14,}  {saved}"

    def _memory(self) -> Iterator[str]:
        tree = max(tree for step in self.steps for tree in step.trees)
        total = _size(self.memory.total)
        yield f"memory of one process with the largest tree ({tree.tokens:,} tokens), estimate: {total}"
        for field in fields(self.memory):
            yield f"  {field.name:<12}{_size(getattr(self.memory, field.name)):>12}"
        if STRATEGIES[self.strategy].penalty:
            yield "  the penalty's copies of the weights come on top"

    def _time(self) -> Iterator[str]:
        rate = f"{self.flops_per_second / 1e9:,.0f} GFLOP/s"
        yield f"time of training, lower bound: {timedelta(seconds=ceil(self.seconds))}"
        yield f"  {self.flops:.2e} operations, were all as fast as matrix products are here: {rate} ({self.device})"
        yield "  choosing what is replayed, saving and evaluation come on top"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"
