"""The token tree against its definition: rows are the sorted distinct prefixes of what the sequences need laid out."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kpig_fast import _native
from kpig_fast.tree import layout
from kpig_fast.tree.layout import TokenTree, build, pack

Sequences = list[list[int]]

# A busy machine must not fail a property.
unhurried = settings(deadline=None)


def needed(sequences: Sequences, starts: list[int]) -> list[tuple[tuple[int, ...], int]]:
    """What each sequence with a response needs laid out, with the sequence's index, in depth-first order."""
    pairs = zip(sequences, starts, strict=True)
    return sorted((tuple(s[:-1]), i) for i, (s, start) in enumerate(pairs) if start < len(s))


def prefixes(paths: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The nodes of the trie of ``paths``, in depth-first order: lexicographic order puts a prefix first."""
    return sorted({path[:depth] for path in paths for depth in range(1, len(path) + 1)})


def specified(sequences: Sequences, starts: list[int]) -> dict[str, list[int]]:
    """The tree by its definition."""
    served = needed(sequences, starts)
    nodes = prefixes([path for path, _ in served])
    rows = [[nodes.index(path[:j]) for j in range(starts[i], len(path) + 1)] for path, i in served]
    return {
        "input_ids": [node[-1] for node in nodes],
        "position_ids": [len(node) - 1 for node in nodes],
        "subtree_end": [1 + max(q for q, m in enumerate(nodes) if m[: len(n)] == n) for n in nodes],
        "sequences": [i for _, i in served],
        "rows": [row for part in rows for row in part],
        "row_offsets": [0, *itertools.accumulate(map(len, rows))],
    }


def lists(tree: TokenTree) -> dict[str, list[int]]:
    """The tree's arrays as lists."""
    return {name: value.tolist() for name, value in vars(tree).items()}


def cheapest(paths: list[tuple[int, ...]], max_tokens: int) -> tuple[int, int]:
    """Fewest laid-out tokens, then fewest trees, over every way to cut ``paths`` into admissible consecutive runs."""
    costs = []
    for cuts in itertools.product([False, True], repeat=max(len(paths) - 1, 0)):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(paths)]
        runs = [paths[a:b] for a, b in itertools.pairwise(bounds)]
        sizes = [len(prefixes(run)) for run in runs]
        if all(size <= max_tokens or size == max(map(len, run)) for size, run in zip(sizes, runs, strict=True)):
            costs.append((sum(sizes), len(runs)))
    return min(costs)


STEMS = [[], [2], [1] * 15, [1] * 16, [1] * 17, [0, 2] * 20]


@st.composite
def batches(draw: st.DrawFn, most: int = 9) -> tuple[Sequences, list[int]]:
    """Sequences that share much: few tokens, common stems around the block size of the comparison, many copies."""
    tails = st.lists(st.integers(0, 2), max_size=5)
    sequences = draw(st.lists(st.builds(list.__add__, st.sampled_from(STEMS), tails), max_size=most))
    starts = [draw(st.integers(min(1, len(sequence)), len(sequence))) for sequence in sequences]
    return sequences, starts


@given(batches())
@unhurried
def test_build_is_the_specified_tree(batch):
    assert lists(build(*batch)) == specified(*batch)


@given(batches())
@unhurried
def test_ancestors_of_a_row_are_the_tokens_before_its_response_token(batch):
    sequences, starts = batch
    tree = build(sequences, starts)
    for served, i in enumerate(tree.sequences.tolist()):
        rows = tree.rows_of(served).tolist()
        assert len(rows) == len(sequences[i]) - starts[i]
        for j, row in enumerate(rows, starts[i]):
            ancestors = [k for k in range(row + 1) if row < tree.subtree_end[k]]
            assert tree.input_ids[ancestors].tolist() == sequences[i][:j]
            assert tree.position_ids[ancestors].tolist() == list(range(j))


@given(batches(most=7), st.integers(1, 60))
@unhurried
def test_pack_lays_out_the_fewest_tokens_over_all_consecutive_cuts(batch, max_tokens):
    trees = pack(*batch, max_tokens=max_tokens)
    paths = [path for path, _ in needed(*batch)]
    assert (sum(map(len, trees)), len(trees)) == (cheapest(paths, max_tokens) if paths else (0, 0))


@given(batches(), st.integers(1, 60))
@unhurried
def test_every_packed_tree_is_the_tree_of_its_sequences(batch, max_tokens):
    sequences, starts = batch
    trees = pack(sequences, starts, max_tokens=max_tokens)
    for tree in trees:
        served = tree.sequences.tolist()
        alone = build([sequences[i] for i in served], [starts[i] for i in served])
        assert lists(tree) == lists(alone) | {"sequences": served}
        assert len(tree) <= max_tokens or len(tree) == int(tree.position_ids.max()) + 1
    assert [i for tree in trees for i in tree.sequences.tolist()] == [i for _, i in needed(sequences, starts)]


def test_two_branches_by_hand():
    tree = build([[5, 6, 7, 8], [5, 6, 9, 9], [4, 4]], [2, 3, 1])
    assert lists(tree) == {
        "input_ids": [4, 5, 6, 7, 9],
        "position_ids": [0, 0, 1, 2, 2],
        "subtree_end": [1, 5, 5, 4, 5],
        "sequences": [2, 0, 1],
        "rows": [0, 2, 3, 4],
        "row_offsets": [0, 1, 3, 4],
    }
    assert len(tree) == 5
    assert tree.rows_of(1).tolist() == [2, 3]


def test_identical_sequences_and_prefixes_share_all_rows():
    tree = build([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 9]], [1, 2, 2, 2])
    assert tree.input_ids.tolist() == [1, 2, 3, 9]
    assert tree.sequences.tolist() == [2, 0, 1, 3]
    assert [tree.rows_of(i).tolist() for i in range(4)] == [[1], [0, 1, 2], [1, 2], [1, 3]]


def test_last_token_is_never_laid_out():
    tree = build([[1, 2, 3], [1, 2, 4]], [1, 2])
    assert tree.input_ids.tolist() == [1, 2]
    assert [tree.rows_of(i).tolist() for i in range(2)] == [[0, 1], [1]]


@pytest.mark.parametrize(("sequences", "starts"), [([], []), ([[]], [0]), ([[1], [1, 2, 3]], [1, 3])])
def test_nothing_to_predict_gives_an_empty_tree_and_no_packed_tree(sequences, starts):
    tree = build(sequences, starts)
    assert lists(tree) == lists(build([], [])) == specified([], [])
    assert len(tree) == 0
    assert pack(sequences, starts, max_tokens=5) == []


def test_sequences_without_a_response_are_not_served():
    tree = build([[], [7, 8], [7, 8]], [0, 2, 1])
    assert tree.sequences.tolist() == [2]
    assert tree.input_ids.tolist() == [7]


@pytest.mark.parametrize("tree", [build([], []), build([[3, 4]], [1])])
def test_types_are_documented_ones(tree):
    for name, value in vars(tree).items():
        assert value.dtype == (torch.int32 if name in ("input_ids", "position_ids", "subtree_end") else torch.int64)


def test_a_sequence_beyond_the_budget_has_a_tree_with_its_prefixes_and_copies():
    long = [1, 2, 3, 4, 5, 6]
    trees = pack([long, [1, 2, 3], long, [1, 9, 9]], [1, 1, 5, 1], max_tokens=3)
    assert [tree.sequences.tolist() for tree in trees] == [[1, 0, 2], [3]]
    assert [len(tree) for tree in trees] == [5, 2]


def test_to_moves_every_array():
    tree = build([[1, 2]], [1]).to("meta")
    assert {value.device.type for value in vars(tree).values()} == {"meta"}


@pytest.mark.parametrize(
    "form", [tuple, np.array, torch.tensor, lambda s: np.array(s, np.uint16), lambda s: np.array(s, ">i8")]
)
def test_sequences_may_come_in_any_integer_form(form):
    sequences = [[60000, 2, 3], [60000, 2, 4, 5]]
    tree = build([form(sequence) for sequence in sequences], np.array([1, 2], np.uint8))
    assert lists(tree) == specified(sequences, [1, 2])


def test_inputs_are_left_alone_and_outputs_outlive_them():
    array = np.array([5, 6, 7], np.int32)
    tree = build([array], [1])
    assert array.tolist() == [5, 6, 7]
    array[:] = 0
    assert tree.input_ids.tolist() == [5, 6]
    tree.input_ids[0] = 9
    assert array.tolist() == [0, 0, 0]


def test_many_threads_get_the_same_trees():
    rng = np.random.default_rng(0)
    stems = rng.integers(0, 50, (5, 200))
    sequences = [np.concatenate([stems[i % 5], rng.integers(0, 50, 100)]) for i in range(400)]
    results: list = [None] * 4

    def work(slot: int) -> None:
        results[slot] = [lists(tree) for tree in pack(sequences, [250] * 400, max_tokens=4096)]

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0]
    assert all(result == results[0] for result in results)


def test_build_refuses_more_rows_than_int32_can_number(monkeypatch):
    monkeypatch.setattr(layout, "INT32_MAX", 3)
    assert len(build([[0, 1, 1], [0, 2, 2]], [1, 1])) == 3
    with pytest.raises(ValueError, match="3 sequences need more than 3 rows in one tree; use pack"):
        build([[0, 1, 1], [0, 2, 2], [3, 3]], [1, 1, 1])


def test_a_sequence_that_no_tree_can_hold_is_refused(tmp_path):
    sparse = tmp_path / "tokens"
    length = 2**31 + 1
    with sparse.open("wb") as file:
        file.truncate(4 * length)
    tokens = np.memmap(sparse, np.int32, mode="r")
    with pytest.raises(ValueError, match=f"sequence 0 has {length} tokens, more than a tree of 2147483647 rows"):
        _native.pack_forests(tokens, np.array([0, length]), np.array([1]), max_tokens=8)


@pytest.mark.parametrize(
    ("sequences", "starts", "max_tokens", "message"),
    [
        ([[1, 2], [3, -4]], [1, 1], 8, r"sequence 1 has token id -4; token ids lie in 0 \.\.\. 2147483647"),
        ([[1, 2**31]], [1], 8, "sequence 0 has token id 2147483648; token ids lie in"),
        ([[], [2**70]], [0, 1], 8, r"sequence 1 has shape \(1,\) and type object; give one-dimensional integers"),
        ([[1.0, 2.0]], [1], 8, "sequence 0 has shape .* and type float64; give one-dimensional integers"),
        ([np.array([True, False])], [1], 8, "type bool; give one-dimensional integers"),
        (["ab"], [1], 8, "sequence 0 has shape .*; give one-dimensional integers"),
        ([np.zeros((2, 2), int)], [1], 8, r"sequence 0 has shape \(2, 2\)"),
        ([7], [0], 8, r"sequence 0 has shape \(\)"),
        ([[1, 2]], [1.0], 8, "response_start has shape .* and type float64; give one-dimensional integers"),
        ([[1, 2]], [1, 1], 8, "offsets has 2 values, but response_start has 2; give one more offset than sequences"),
        ([[1, 2]], [-1], 8, r"response_start\[0\] = -1 lies outside sequence 0 of 2 tokens; it must be the index"),
        ([[1], [1, 2]], [1, 3], 8, r"response_start\[1\] = 3 lies outside sequence 1 of 2 tokens"),
        ([[1, 2]], [0], 8, r"response_start\[0\] = 0 leaves no prompt token .*put at least one token"),
        ([[1, 2]], [1], 0, "max_tokens = 0; give a tree between 1 and 2147483647 tokens"),
        ([], [], -(2**63), "max_tokens = -9223372036854775808; give a tree"),
        ([], [], 2**31, "max_tokens = 2147483648; give a tree"),
    ],
)
def test_bad_sequences_name_the_value_and_the_fix(sequences, starts, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        pack(sequences, starts, max_tokens=max_tokens)


def arrays(tokens=(1, 2), offsets=(0, 2), starts=(1,)) -> list[np.ndarray]:
    """Arguments of the native packer."""
    return [np.array(tokens, np.int32), np.array(offsets, np.int64), np.array(starts, np.int64)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (arrays(offsets=()), "offsets has 0 values, but response_start has 1; give one more"),
        (arrays(offsets=(1, 2)), r"offsets\[0\] = 1; the first offset must be 0"),
        (arrays(offsets=(0, 3, 2), starts=(1, 0)), r"offsets\[2\] = 2 makes the length of sequence 1 negative"),
        (arrays(offsets=(0, 2**63 - 1, -(2**63)), starts=(1, 0)), r"offsets\[2\] = -9223372036854775808 makes"),
        (arrays(offsets=(0, 3)), r"offsets\[1\] = 3, but there are 2 tokens; the last offset must be"),
        (arrays(offsets=(0, -(2**63))), r"offsets\[1\] = -9223372036854775808 makes the length of sequence 0 negative"),
        (arrays(tokens=(1, -7)), r"tokens\[1\] = -7; token ids must not be negative"),
        ([np.array([1, 2]), *arrays()[1:]], "tokens is a 1-dimensional array of int64; .* array of int32"),
        ([np.array([1, 2], ">i4"), *arrays()[1:]], "tokens is a 1-dimensional array of >i4"),
        ([np.zeros(4, np.int32)[::2], *arrays()[1:]], "give a contiguous, aligned one-dimensional array of int32"),
        ([np.frombuffer(bytes(9), np.int32, offset=1), *arrays()[1:]], "give a contiguous, aligned one-dimensional"),
        ([np.zeros((1, 2), np.int32), *arrays()[1:]], "tokens is a 2-dimensional array of int32"),
        ([np.array(1, np.int32), *arrays()[1:]], "tokens is a 0-dimensional array of int32"),
        ([*arrays()[:2], np.array([1.0])], "response_start is a 1-dimensional array of float64; .* array of int64"),
    ],
)
def test_bad_arrays_name_the_value_and_the_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.pack_forests(*arguments, max_tokens=8)


def well_formed(tokens: list[int], offsets: list[int], starts: list[int], max_tokens: int) -> bool:
    """Whether the native packer must accept the arguments."""
    if len(offsets) != len(starts) + 1 or offsets[0] != 0 or offsets[-1] != len(tokens) or not 1 <= max_tokens < 2**31:
        return False
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    fits = all(length >= 0 and min(1, length) <= start <= length for start, length in zip(starts, lengths, strict=True))
    return fits and all(token >= 0 for token in tokens)


EXTREMES = st.sampled_from([-(2**63), -(2**31), -1, 2**31, 2**63 - 1])
SMALL = st.integers(0, 6)


@given(
    st.lists(st.integers(0, 3) | st.sampled_from([-(2**31), -1, 2**31 - 1]), max_size=6),
    st.lists(SMALL, max_size=4).map(sorted) | st.lists(SMALL | EXTREMES, max_size=4),
    st.lists(SMALL | EXTREMES, max_size=4),
    st.integers(-1, 8) | EXTREMES,
    st.booleans(),
)
@settings(unhurried, max_examples=1500)
def test_the_packer_raises_on_bad_arrays_and_only_on_them(tokens, offsets, starts, max_tokens, close):
    if close:
        offsets = [0, *offsets[: max(len(starts) - 1, 0)], len(tokens)]
    arguments = arrays(tokens, offsets, starts)
    if not well_formed(tokens, offsets, starts, max_tokens):
        with pytest.raises(ValueError, match="; "):
            _native.pack_forests(*arguments, max_tokens=max_tokens)
        return
    served = sorted(i for forest in _native.pack_forests(*arguments, max_tokens=max_tokens) for i in forest[3])
    assert served == [i for i, start in enumerate(starts) if start < offsets[i + 1] - offsets[i]]


DTYPES = st.sampled_from(["i1", "i4", "i8", ">i4", ">i8", "u4", "u8", "f4", "f8", "c16", "?", "S3", "U2", "O", "M8[s]"])
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@given(st.lists(st.tuples(DTYPES, SHAPES), min_size=3, max_size=3))
@unhurried
def test_the_packer_never_crashes_on_arrays_of_other_types(forms):
    arguments = [np.zeros(shape, dtype) for dtype, shape in forms]
    wanted = ["int32", "int64", "int64"]
    if any(a.ndim != 1 or str(a.dtype) != dtype for a, dtype in zip(arguments, wanted, strict=True)):
        with pytest.raises(ValueError, match="give a contiguous, aligned one-dimensional array"):
            _native.pack_forests(*arguments, max_tokens=8)
