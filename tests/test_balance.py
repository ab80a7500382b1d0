"""Bins of instances: sizes worked out by hand, the best that there is, skewed lengths, real tasks."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kpig_fast import EncodedPair
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.natural_instructions import load_natural_instructions
from kpig_fast.data.schema import make_instance
from kpig_fast.training.balance import TOLERANCE, balanced_bins
from kpig_fast.tree.layout import build

END = 0


def sizes(pairs: Sequence[EncodedPair], bins: Sequence[Sequence[int]], *, masked: bool = True) -> list[int]:
    """Tokens of the tree that the packer makes of each bin."""
    return [laid_out([pairs[i] for i in members], masked) for members in bins]


def laid_out(pairs: Sequence[EncodedPair], masked: bool) -> int:
    prompts = [p.complete_ids for p in pairs] + [p.masked_ids for p in pairs if masked]
    responses = [p.response_ids for p in pairs] * (1 + masked)
    return len(build([[*x, *y] for x, y in zip(prompts, responses)], [len(x) for x in prompts]))


def above_mean(found: Sequence[int]) -> float:
    return max(found) * len(found) / sum(found) - 1


class Ids:
    """Token ids that were not there before."""

    def __init__(self) -> None:
        self.last = END

    def __call__(self, n: int) -> list[int]:
        self.last += n
        return list(range(self.last - n + 1, self.last + 1))


# By hand. A response of one token lays nothing out.


def test_instances_that_share_nothing():
    new = Ids()
    pairs = [EncodedPair(ids, ids, [END]) for ids in map(new, (6, 5, 4, 3, 2))]
    bins = balanced_bins(pairs, 2, masked=False)
    assert sorted(map(sorted, bins)) == [[0, 2], [1, 3, 4]]
    assert sizes(pairs, bins, masked=False) == [10, 10]


def test_an_exchange_where_filling_in_turn_ends_uneven():
    """First 4 + 4 + 3 and 3 + 3 + 3 tokens."""
    new = Ids()
    pairs = [EncodedPair(ids, ids, [END]) for ids in map(new, (4, 4, 3, 3, 3, 3))]
    bins = balanced_bins(pairs, 2, masked=False)
    assert sorted(i for members in bins for i in members) == list(range(6))
    assert sizes(pairs, bins, masked=False) == [10, 10]


def test_an_instruction_stays_together():
    new = Ids()
    starts = [new(50), new(50)]
    pairs = [EncodedPair(ids, ids, [END]) for ids in ([*starts[n % 2], *new(10)] for n in range(8))]
    bins = balanced_bins(pairs, 2, masked=False)
    assert sorted(map(sorted, bins)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # Half of each instruction in each bin would be 50 + 50 + 4 · 10 = 140 tokens.
    assert sizes(pairs, bins, masked=False) == [50 + 4 * 10] * 2


def test_the_masked_branch_counts():
    new = Ids()
    instruction, masks = new(10), new(30)
    pairs = [EncodedPair(ids, ids, [END]) for ids in (new(10), new(10), new(10))]
    pairs.append(EncodedPair(instruction, [*instruction[:5], *masks], [END]))
    assert sizes(pairs, balanced_bins(pairs, 2, masked=False), masked=False) == [20, 20]
    bins = balanced_bins(pairs, 2, masked=True)
    # 10 tokens, and after the 5 that are common the masks.
    assert bins == [[3], [0, 1, 2]]
    assert sizes(pairs, bins) == [10 + 30, 3 * 10]


def test_response_tokens_count_but_for_the_last():
    new = Ids()
    pairs = [EncodedPair(ids, ids, response) for ids, response in ((new(1), new(4)), (new(2), [END]), (new(2), [END]))]
    bins = balanced_bins(pairs, 2, masked=False)
    assert bins == [[0], [1, 2]]
    assert sizes(pairs, bins, masked=False) == [4, 4]


def test_one_instance_larger_than_all_others_together_stands_alone():
    new = Ids()
    pairs = [EncodedPair(ids, ids, [END]) for ids in map(new, (3, 100, 5, 4, 3, 5))]
    bins = balanced_bins(pairs, 3, masked=True)
    assert bins[0] == [1]
    assert sum(sizes(pairs, bins)) == 100 + 3 + 5 + 4 + 3 + 5


@pytest.mark.parametrize("masked", [False, True])
def test_copies_cost_nothing(masked):
    pair = EncodedPair([1, 2, 3], [1, 9, 3], [4, 5])
    bins = balanced_bins([pair] * 7, 3, masked=masked)
    assert sizes([pair] * 7, bins, masked=masked) == [7 if masked else 4] * 3


def test_fewer_instances_than_bins():
    pairs = [EncodedPair(ids, ids, [END]) for ids in ([1], [2, 3])]
    assert balanced_bins(pairs, 4, masked=True) == [[1], [0], [], []]
    assert balanced_bins([], 2, masked=True) == [[], []]


# Any instances.

ids = st.lists(st.integers(0, 2), min_size=1, max_size=6)
some_pairs = st.lists(st.builds(EncodedPair, ids, ids, ids), min_size=1, max_size=12)


@given(some_pairs, st.integers(1, 15), st.booleans())
@settings(deadline=None)
def test_every_instance_is_in_one_bin_and_no_bin_is_needlessly_empty(pairs, n, masked):
    bins = balanced_bins(pairs, n, masked=masked)
    assert len(bins) == n
    assert sorted(i for members in bins for i in members) == list(range(len(pairs)))
    assert sum(map(bool, bins)) == min(n, len(pairs))
    assert bins == balanced_bins(pairs, n, masked=masked)


@given(st.lists(ids, min_size=1, max_size=12), st.integers(1, 6))
@settings(deadline=None)
def test_the_largest_tree_comes_first(prompts, n):
    pairs = [EncodedPair(prompt, prompt, [END]) for prompt in prompts]
    found = sizes(pairs, balanced_bins(pairs, n, masked=False), masked=False)
    assert found == sorted(found, reverse=True)


def few_instances(rng: np.random.Generator) -> list[EncodedPair]:
    """Seven instances of two instructions of any lengths, with masks from anywhere on."""
    new = Ids()
    instructions = [new(int(rng.integers(5, 40))) for _ in range(2)]
    masks = [[*x[: int(rng.integers(len(x)))], *new(int(rng.integers(1, 20)))] for x in instructions]
    pairs = []
    for _ in range(7):
        of, context = int(rng.integers(2)), new(int(rng.integers(1, 40)))
        response = [*new(int(rng.integers(10))), END]
        pairs.append(EncodedPair([*instructions[of], *context], [*masks[of], *context], response))
    return pairs


def least_largest(pairs: Sequence[EncodedPair], n: int) -> int:
    """The smallest largest tree over all distributions into ``n`` bins."""
    size = {chosen: laid_out([p for p, c in zip(pairs, chosen) if c], True) for chosen in product([0, 1], repeat=7)}
    return min(
        max(size[tuple(int(b == bin_) for b in bins)] for bin_ in range(n)) for bins in product(range(n), repeat=7)
    )


@pytest.mark.parametrize("n", [2, 3])
def test_close_to_the_best_distribution_that_there_is(n):
    cases = [few_instances(np.random.default_rng(seed)) for seed in range(25)]
    over = [max(sizes(pairs, balanced_bins(pairs, n, masked=True))) / least_largest(pairs, n) for pairs in cases]
    assert min(over) == 1
    assert sum(over) / len(over) < 1.03
    assert max(over) < 1.15


# Many instances


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("per_bin", "n"), [(8, 48), (16, 8), (48, 8), (64, 2)])
def test_skewed_lengths(per_bin, n, seed):
    """Log-normal lengths: one instance in a hundred has ten times the median."""
    rng, new = np.random.default_rng(seed), Ids()
    instructions = [new(int(rng.integers(50, 250))) for _ in range(20)]
    pairs = []
    for _ in range(per_bin * n):
        prompt = [*instructions[int(rng.integers(20))], *new(int(rng.lognormal(4, 1)) + 1)]
        pairs.append(EncodedPair(prompt, [prompt[0], 1, *prompt[20:]], [*new(5), END]))
    found = sizes(pairs, balanced_bins(pairs, n, masked=True))
    assert max(found) <= max((1 + TOLERANCE) * np.mean(found), *(laid_out([pair], True) for pair in pairs))


@pytest.fixture(scope="module")
def real(shared: Path) -> list[tuple[str, EncodedPair]]:
    """Task and token ids of 4,800 training instances of 32 tasks, in six wordings each on average."""
    core = shared / "data" / "sni_core"
    tasks, _ = load_natural_instructions(core / "tasks", side_file=[core / "manifest.json", core / "pools.jsonl"])
    rows, rng = [row for row in tasks.rows if row.split == "train"], np.random.default_rng(0)
    wordings = [int(rng.integers(len(tasks.tasks[row.task].instructions))) for row in rows]
    instances = [make_instance(tasks.tasks[row.task], row, wording) for row, wording in zip(rows, wordings)]
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(shared / "models" / "stories260K-sni"))
    pairs = encoder.encode_all(instances)
    order = rng.permutation(len(rows)).tolist()
    return [(rows[i].task, pairs[i]) for i in order]


@pytest.mark.parametrize(("per_bin", "n", "of_shuffled"), [(48, 8, 0.75), (8, 48, 0.75), (16, 8, 0.9), (32, 2, 0.95)])
@pytest.mark.parametrize("n_tasks", [4, 32])
def test_real_tasks_are_balanced_and_keep_what_they_share(real, n_tasks, per_bin, n, of_shuffled):
    """Within 3 % of the tokens of the same order cut into equal numbers of instances, and far below those unordered."""
    names, size = sorted({task for task, _ in real})[:n_tasks], per_bin * n
    pairs = [pair for task, pair in real if task in names][:size]
    assert len(pairs) == size
    found = sizes(pairs, balanced_bins(pairs, n, masked=True))
    assert above_mean(found) <= TOLERANCE

    in_order = sorted(range(size), key=lambda i: pairs[i].complete_ids)
    grouped = sizes(pairs, [in_order[start : start + per_bin] for start in range(0, size, per_bin)])
    shuffled = sizes(pairs, [range(start, start + per_bin) for start in range(0, size, per_bin)])
    assert above_mean(grouped) > above_mean(found)
    assert sum(found) <= 1.03 * sum(grouped)
    assert sum(found) <= of_shuffled * sum(shuffled)


def test_small_real_micro_batches_are_balanced_too(real):
    pairs = [pair for _, pair in real]
    for start in range(0, 3200, 32):
        batch = pairs[start : start + 32]
        assert above_mean(sizes(batch, balanced_bins(batch, 4, masked=True))) <= TOLERANCE
