"""What is trained between two logs: sums over response rows, and throughput."""

import time
from typing import NamedTuple

from torch import Tensor

from kpig_fast.processes import gather


class _Sums(NamedTuple):
    log_probs: Tensor | float = 0.0
    rows: int = 0
    jsd: Tensor | float = 0.0
    masked_rows: int = 0
    instances: int = 0
    tokens: int = 0


class Tally:
    """Adds up forests and micro-batches; those of an optimizer step count once it is settled."""

    def __init__(self) -> None:
        self._sums: list[_Sums] = []
        self._settled = 0
        self.start()

    def start(self) -> None:
        """Count the time from now on."""
        self._clock = time.perf_counter()

    def add_forest(self, log_probs: Tensor, jsd: Tensor) -> None:
        """Log-probs [N] of the complete rows and divergences [M] of the masked ones."""
        self._sums.append(_Sums(log_probs.sum(), len(log_probs), jsd.sum(), len(jsd)))

    def add_batch(self, instances: int, tokens: int) -> None:
        """Instances of a micro-batch, and prompt and response tokens of their complete side."""
        self._sums.append(_Sums(instances=instances, tokens=tokens))

    def settle(self) -> None:
        """The optimizer step is over."""
        self._settled = len(self._sums)

    def forget(self) -> None:
        """The optimizer step is begun again."""
        del self._sums[self._settled :]

    def take(self) -> dict[str, float]:
        """Means a response token and throughput since the last call, over all processes, which all call this."""
        sums = [[float(sum(column)) for column in zip(*self._sums)]]
        log_probs, rows, jsd, masked_rows, instances, tokens = (sum(column) for column in zip(*gather(sums)))
        seconds = time.perf_counter() - self._clock
        self._clock += seconds
        self._sums.clear()
        self._settled = 0
        return {
            "cross_entropy": -log_probs / max(rows, 1),
            **({"jsd": jsd / masked_rows} if masked_rows else {}),
            "instances_per_second": instances / seconds,
            "tokens_per_second": tokens / seconds,
        }
