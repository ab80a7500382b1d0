"""Speed of the tree packer in input tokens per second: few instructions, complete and masked, over many instances.

``pytest -s benchmarks/test_tree_builder.py`` prints M tokens/s; ``--benchmark-json`` stores it as extra information.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from kpig_fast import _native
from kpig_fast.tree.layout import pack

INSTRUCTIONS, INSTRUCTION, CONTEXT, RESPONSE = 20, 150, 110, 40
KEY_PARTS, MASK, VOCABULARY = ((60, 64), (90, 97), (120, 123)), (58, 44483, 60), 50_257
MAX_TOKENS = 8192


@dataclass(frozen=True)
class Batch:
    """Sequences of about 300 tokens in random order, as arrays."""

    sequences: list[NDArray[np.int32]]
    response_start: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Input tokens of all sequences."""
        return sum(map(len, self.sequences))


def masked(instruction: NDArray[np.int32]) -> NDArray[np.int32]:
    """The instruction with each key part replaced by the tokens of the mask text."""
    pieces, done = [], 0
    for start, end in KEY_PARTS:
        pieces += [instruction[done:start], np.array(MASK, np.int32)]
        done = end
    return np.concatenate([*pieces, instruction[done:]])


@pytest.fixture(scope="module", params=[50, 1000], ids="{} instances per instruction".format)
def batch(request: pytest.FixtureRequest) -> Batch:
    """Every instance under its complete and its masked instruction."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(INSTRUCTIONS):
        instruction = rng.integers(VOCABULARY, size=INSTRUCTION, dtype=np.int32)
        variants = [instruction, masked(instruction)]
        for _ in range(request.param):
            rest = rng.integers(VOCABULARY, size=CONTEXT + RESPONSE, dtype=np.int32)
            pairs += [(np.concatenate([variant, rest]), len(variant) + CONTEXT) for variant in variants]
    shuffled = [pairs[i] for i in rng.permutation(len(pairs))]
    return Batch([sequence for sequence, _ in shuffled], np.array([start for _, start in shuffled]))


def measure(benchmark, batch: Batch, run) -> None:
    """Time ``run`` and record its speed and the factor by which sharing shrinks the batch."""
    trees = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    benchmark.extra_info["M tokens/s"] = round(batch.tokens / benchmark.stats.stats.min / 1e6, 1)
    benchmark.extra_info["input / laid out"] = round(batch.tokens / sum(map(len, trees)), 2)
    print(benchmark.name, benchmark.extra_info)


def test_native_packer(benchmark, batch: Batch) -> None:
    """The C++ alone, from flat arrays."""
    tokens = np.concatenate(batch.sequences)
    offsets = np.cumsum([0, *map(len, batch.sequences)])

    def run() -> list[NDArray[np.int32]]:
        forests = _native.pack_forests(tokens, offsets, batch.response_start, max_tokens=MAX_TOKENS)
        return [forest[0] for forest in forests]

    measure(benchmark, batch, run)


@pytest.mark.parametrize("form", ["arrays", "lists"])
def test_pack(benchmark, batch: Batch, form: str) -> None:
    """The public function, with the flattening of arrays or of Python lists."""
    sequences = batch.sequences if form == "arrays" else [sequence.tolist() for sequence in batch.sequences]
    measure(benchmark, batch, lambda: pack(sequences, batch.response_start, max_tokens=MAX_TOKENS))
