"""Forests hold what the loss reads, for any cut; the sampler keeps every optimizer batch's members."""

import pickle
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kpig_fast import EncodedPair
from kpig_fast.training.batches import Forest, ForestCollator, GroupedSampler, TrainingExample
from kpig_fast.tree.layout import TokenTree

EXAMPLES = [
    TrainingExample(EncodedPair([1, 2, 3], [1, 9, 3], [4, 5]), group=0, temperature=1.5, teacher_row=0),
    TrainingExample(EncodedPair([1, 2, 3, 6], [1, 9, 3, 6], [7]), group=0, temperature=1.25, teacher_row=2),
    TrainingExample(EncodedPair([8], [8], [8, 8, 8]), group=1, temperature=2.0, teacher_row=3),
    TrainingExample(EncodedPair([1, 2, 3], [1, 9, 3], [4, 5]), group=0, temperature=1.5, teacher_row=6),
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
            st.just(0),
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


# The sampler


def batches(sampler: GroupedSampler, size: int) -> list[list[int]]:
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_members_are_the_shuffle_s_and_only_their_order_is_by_group(
    groups: list[int], size: int, seed: int, epoch: int
) -> None:
    sampler = GroupedSampler(groups, size, seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(groups)
    found = batches(sampler, size)
    # With every instance in a group of its own place nothing is moved inside a batch but into ascending order.
    alone = GroupedSampler(range(len(groups)), size, seed)
    alone.set_epoch(epoch)
    assert [sorted(batch) for batch in found] == batches(alone, size)
    for batch in found:
        inside = [groups[i] for i in batch]
        assert inside == sorted(inside)


def test_members_do_not_depend_on_the_groups() -> None:
    rng = np.random.default_rng(0)
    one, other = (batches(GroupedSampler(rng.integers(0, 5, 50), 8, 3), 8) for _ in range(2))
    assert [set(batch) for batch in one] == [set(batch) for batch in other]
    assert one != other
    assert sorted(i for batch in one for i in batch) == list(range(50))
    assert [len(batch) for batch in one] == [8, 8, 8, 8, 8, 8, 2]


def test_a_seed_is_an_order() -> None:
    groups = [0] * 30
    assert list(GroupedSampler(groups, 4, 1)) == list(GroupedSampler(groups, 4, 1))
    assert list(GroupedSampler(groups, 4, 1)) != list(GroupedSampler(groups, 4, 2))
    sampler = GroupedSampler(groups, 4, 1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
