"""Forests hold what the loss reads, for any cut; micro-batches hold every optimizer batch's members, for any cut."""

import pickle
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from kpig_fast import EncodedPair
from kpig_fast.ops.linear_kpig_loss import KPIGLoss, linear_kpig_loss
from kpig_fast.training.batches import BalancedBatches, Forest, ForestCollator, TrainingExample, filler_forest
from kpig_fast.tree.layout import TokenTree
from kpig_fast.tree.model import OutputHead, run_tree, tree_mode

EXAMPLES = [
    TrainingExample(EncodedPair([1, 2, 3], [1, 9, 3], [4, 5]), temperature=1.5, teacher_row=0),
    TrainingExample(EncodedPair([1, 2, 3, 6], [1, 9, 3, 6], [7]), temperature=1.25, teacher_row=2),
    TrainingExample(EncodedPair([8], [8], [8, 8, 8]), temperature=2.0, teacher_row=3),
    TrainingExample(EncodedPair([1, 2, 3], [1, 9, 3], [4, 5]), temperature=1.5, teacher_row=6),
]

Read = Counter[tuple]


def path(tree: TokenTree, row: int) -> tuple[int, ...]:
    """Tokens from the root to ``row``."""
    ancestors = [k for k in range(row + 1) if row < int(tree.subtree_end[k])]
    assert [int(tree.position_ids[k]) for k in ancestors] == list(range(len(ancestors)))
    return tuple(int(tree.input_ids[k]) for k in ancestors)


def complete_reads(forests: Sequence[Forest]) -> Read:
    """(what the model has seen, target) of every complete row."""
    return Counter(
        (path(forest.tree, row), target)
        for forest in forests
        for row, target in zip(forest.rows.tolist(), forest.target.tolist(), strict=True)
    )


def masked_reads(forests: Sequence[Forest]) -> Read:
    """(what the model has seen, the teacher's row, temperature) of every masked row."""
    return Counter(
        (path(forest.tree, row), teacher_row, beta)
        for forest in forests
        for row, teacher_row, beta in zip(
            forest.masked_rows.tolist(), forest.teacher_rows.tolist(), forest.temperature.tolist(), strict=True
        )
    )


def expected_complete(examples: Sequence[TrainingExample]) -> Read:
    return Counter(
        ((*e.pair.complete_ids, *e.pair.response_ids[:k]), target)
        for e in examples
        for k, target in enumerate(e.pair.response_ids)
    )


def expected_masked(examples: Sequence[TrainingExample]) -> Read:
    return Counter(
        ((*e.pair.masked_ids, *e.pair.response_ids[:k]), e.teacher_row + k, e.temperature)
        for e in examples
        for k in range(len(e.pair.response_ids))
    )


@pytest.mark.parametrize("max_tokens", [1, 4, 7, 1000])
def test_forests_hold_every_row_once(max_tokens: int) -> None:
    batch = ForestCollator(max_tokens, masked=True)(EXAMPLES)
    assert complete_reads(batch["forests"]) == expected_complete(EXAMPLES)
    assert masked_reads(batch["forests"]) == expected_masked(EXAMPLES)
    assert int(batch["n_items"]) == 2 + 1 + 3 + 2
    if max_tokens == 1000:
        assert len(batch["forests"]) == 1
        # 1 {2 {3 {4, 6}}, 9 {3 {4, 6}}} and 8 {8 {8}}: the last token of a response needs no row.
        assert len(batch["forests"][0].tree) == 9 + 3
    else:
        assert len(batch["forests"]) > 1


def test_without_the_masked_branch() -> None:
    batch = ForestCollator(1000, masked=False)(EXAMPLES)
    assert complete_reads(batch["forests"]) == expected_complete(EXAMPLES)
    assert masked_reads(batch["forests"]) == Counter()
    assert [forest.temperature.dtype for forest in batch["forests"]] == [torch.float32]
    assert len(batch["forests"][0].tree) == 5 + 3
    assert int(batch["n_items"]) == 8


ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(
    st.lists(
        st.builds(
            TrainingExample,
            st.builds(EncodedPair, ids, ids, ids),
            st.sampled_from([1.0, 1.5]),
            st.integers(0, 99),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 40),
)
@settings(deadline=None, max_examples=60)
def test_any_examples_in_any_budget(examples: list[TrainingExample], max_tokens: int) -> None:
    forests = ForestCollator(max_tokens, masked=True)(examples)["forests"]
    assert complete_reads(forests) == expected_complete(examples)
    assert masked_reads(forests) == expected_masked(examples)


def test_forests_travel_between_processes_and_devices() -> None:
    (forest,) = ForestCollator(1000, masked=True)(EXAMPLES)["forests"]
    copy = pickle.loads(pickle.dumps(forest))
    assert masked_reads([copy]) == expected_masked(EXAMPLES)
    moved = forest.to("meta")
    on_device = [moved.tree.input_ids, moved.tree.subtree_end, moved.rows, moved.target, moved.masked_rows]
    assert {x.device.type for x in [*on_device, moved.temperature]} == {"meta"}
    assert moved.teacher_rows.device.type == "cpu"


def test_counts() -> None:
    examples = [*EXAMPLES, TrainingExample(EncodedPair([1, 2, 3], [1, 9], [4, 5]))]
    batch = ForestCollator(7, masked=True)(examples)
    assert int(batch["n_items"]) == 2 + 1 + 3 + 2 + 2
    # Complete prompts and responses; neither the masked branch nor what is shared makes a difference.
    assert int(batch["n_tokens"]) == 5 + 5 + 4 + 5 + 5
    assert int(batch["n_instances"]) == 5
    assert {batch[name].dtype for name in ("n_items", "n_tokens", "n_instances")} == {torch.int64}
    assert batch["examples"] == examples
    assert batch["max_tokens"] == 7


def test_an_empty_micro_batch() -> None:
    batch = ForestCollator(1000, masked=True)([])
    assert batch["forests"] == []
    assert [int(batch[name]) for name in ("n_items", "n_tokens", "n_instances")] == [0, 0, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_filler_has_no_loss_and_zero_gradients(family: str) -> None:
    model, forest = make_model(family), filler_forest()

    def loss(hidden: Tensor, head: OutputHead) -> KPIGLoss:
        complete, masked = hidden.index_select(0, forest.rows), hidden.index_select(0, forest.masked_rows)
        sides = (
            complete,
            forest.target,
            masked,
            masked.detach(),
            forest.temperature,
            head.weight,
            head.weight.detach(),
        )
        return linear_kpig_loss(*sides, ce_scale=1.0, jsd_scale=1.0, **head.transform)

    with tree_mode(model):
        out = run_tree(model, forest.tree, loss)
        out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert (len(out.log_probs), len(out.jsd)) == (0, 0)
    # None would leave other processes waiting for it.
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


# The micro-batches

CUT = {"micro_batch": 2, "accumulation": 2, "processes": 2}


def batches_of(pairs: Sequence[EncodedPair], **changes: Any) -> BalancedBatches:
    return BalancedBatches(pairs, **{**CUT, "rank": 0, "seed": 0, "masked": True, **changes})


def all_ranks(pairs: Sequence[EncodedPair], epoch: int = 0, **changes: Any) -> list[list[list[int]]]:
    """The micro-batches of every process."""
    ranks = [batches_of(pairs, rank=rank, **changes) for rank in range({**CUT, **changes}["processes"])]
    for one in ranks:
        one.set_epoch(epoch)
    assert len({len(one) for one in ranks}) == 1
    found = [list(one) for one in ranks]
    assert {len(one) for one in found} == {len(ranks[0])}
    return found


def optimizer_batches(ranks: list[list[list[int]]], accumulation: int) -> list[list[int]]:
    """The members of each, in order, over all processes and micro-batches."""
    starts = range(0, len(ranks[0]), accumulation)
    return [sorted(i for one in ranks for micro in one[s : s + accumulation] for i in micro) for s in starts]


def unlike_pairs(n: int) -> list[EncodedPair]:
    """Instances of three instructions and 1 ... 9 more tokens."""
    pairs = []
    for i in range(n):
        context = [100 + i] * (1 + 7 * i % 9)
        pairs.append(EncodedPair([*[i % 3] * 20, *context], [i % 3, 9, *context], [4, 5]))
    return pairs


few_pairs = st.lists(st.builds(EncodedPair, ids, ids, ids), max_size=30)
small = st.integers(1, 3)


@given(few_pairs, small, small, small, st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None)
def test_the_shuffle_alone_decides_the_members_of_an_optimizer_batch(
    pairs: list[EncodedPair], micro_batch: int, accumulation: int, processes: int, seed: int, epoch: int
) -> None:
    cut = {"micro_batch": micro_batch, "accumulation": accumulation, "processes": processes}
    ranks = all_ranks(pairs, epoch, seed=seed, **cut)
    order = np.random.default_rng([seed, epoch]).permutation(len(pairs)).tolist()
    size = micro_batch * accumulation * processes
    expected = [sorted(order[start : start + size]) for start in range(0, len(order), size)]
    assert optimizer_batches(ranks, accumulation) == expected
    for i, members in enumerate(expected):
        micro_batches = [micro for one in ranks for micro in one[i * accumulation : (i + 1) * accumulation]]
        assert len(micro_batches) == processes * ceil(len(members) / (micro_batch * processes))
        assert sum(map(bool, micro_batches)) == min(len(micro_batches), len(members))


@pytest.mark.parametrize("cut", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2)], ids=str)
def test_any_cut_has_the_same_optimizer_batches(cut: tuple[int, int, int]) -> None:
    pairs = unlike_pairs(21)
    found = optimizer_batches(all_ranks(pairs, **dict(zip(CUT, cut))), cut[1])
    assert found == optimizer_batches(all_ranks(pairs), 2)
    assert [len(members) for members in found] == [8, 8, 5]


def test_trees_of_a_cut_are_alike_whatever_the_instances_are() -> None:
    pairs = unlike_pairs(64)
    cut = {"micro_batch": 16, "accumulation": 1, "processes": 4}
    collate = ForestCollator(10_000, masked=True)
    found = [
        sum(
            len(forest.tree)
            for micro in one
            for forest in collate([TrainingExample(pairs[i]) for i in micro])["forests"]
        )
        for one in all_ranks(pairs, **cut)
    ]
    assert max(found) <= 1.05 * sum(found) / 4


@pytest.mark.parametrize(("masked", "instances"), [(False, [2, 2]), (True, [1, 3])])
def test_the_masked_branch_counts(masked: bool, instances: list[int]) -> None:
    """Four instances of 10 tokens, one with 30 more in its masked branch."""
    pairs = [EncodedPair([n] * 10, [n] * 10, [0]) for n in range(1, 4)]
    pairs.append(EncodedPair([4] * 10, [4] * 5 + [5] * 30, [0]))
    ranks = all_ranks(pairs, micro_batch=2, accumulation=1, masked=masked)
    assert [len(micro) for (micro,) in ranks] == instances


def test_no_process_has_the_larger_micro_batch_twice_running() -> None:
    """Trees of 40, 30, 20 and 10 tokens."""
    pairs = [EncodedPair([n] * n, [n] * n, [0]) for n in (40, 30, 20, 10)]
    found = all_ranks(pairs, micro_batch=1, accumulation=2, processes=2)
    assert found == [[[0], [3]], [[1], [2]]]


def test_seeds_and_epochs_are_orders() -> None:
    pairs = unlike_pairs(30)
    assert list(batches_of(pairs)) == list(batches_of(pairs))
    assert list(batches_of(pairs)) != list(batches_of(pairs, seed=1))
    batches = batches_of(pairs)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert second != first
    assert list(pickle.loads(pickle.dumps(batches))) == second
    batches.set_epoch(0)
    assert list(batches) == first


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_collates_them(workers: int) -> None:
    """Five instances on four processes, two micro-batches each: this one's second is empty."""
    pairs = unlike_pairs(5)
    batches = batches_of(pairs, micro_batch=1, processes=4)
    loader = DataLoader(
        [TrainingExample(pair) for pair in pairs],  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=ForestCollator(1000, masked=True),
        num_workers=workers,
    )
    found = [batch["examples"] for batch in loader]
    assert found == [[TrainingExample(pairs[i]) for i in micro] for micro in batches]
    assert (len(loader), found[1]) == (2, [])
