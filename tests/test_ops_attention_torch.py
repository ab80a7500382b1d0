"""The reference against the definition of a tree, and blocks of any size where attention is plain PyTorch."""

import pytest
import torch
from attention_cases import arrays, attention_inputs, random_parents, run
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import ops_module

from kpig_fast.ops import tree_attention
from kpig_fast.ops.reference import tree_attention_reference, tree_mask

unhurried = settings(deadline=None, max_examples=40)
in_torch = pytest.mark.parametrize("path", ["torch"], indirect=True)


@given(st.integers(0, 60), st.integers(0, 2**31))
@unhurried
def test_mask_is_ancestry(tokens: int, seed: int) -> None:
    parents = random_parents(tokens, seed)
    seen: list[set[int]] = []
    for token, parent in enumerate(parents):
        seen.append({token} | (seen[parent] if parent >= 0 else set()))
    ends, depths = arrays(parents)
    mask = tree_mask(ends, depths)
    windowed = tree_mask(ends, depths, 3)
    for q, ancestors in enumerate(seen):
        assert set(mask[q].nonzero()[:, 0].tolist()) == ancestors
        near = {k for k in ancestors if len(seen[q]) - len(seen[k]) < 3}
        assert set(windowed[q].nonzero()[:, 0].tolist()) == near


@pytest.mark.usefixtures("path")
@in_torch
@given(
    tokens=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    block=st.sampled_from([1, 4, 7, 16]),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.floats(0.5, 5),
    sinks=st.booleans(),
)
@unhurried
def test_random_forests_in_small_blocks(
    tokens: int, seed: int, block: int, window: int | None, softcap: float | None, sinks: bool
) -> None:
    inputs, parents = attention_inputs(tokens, d=3, dv=5, seed=seed, sinks=sinks), random_parents(tokens, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops_module("attention_torch"), "BLOCK", block)
        found = run(tree_attention, inputs, parents, torch.float64, window=window, softcap=softcap)
    exact = run(tree_attention_reference, inputs, parents, torch.float64, window=window, softcap=softcap)
    for name, truth in exact.items():
        torch.testing.assert_close(found[name], truth, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("path")
@in_torch
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_block_size_does_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, parents = attention_inputs(150), random_parents(150, 3)
    expected = run(tree_attention, inputs, parents, torch.float64, window=9)
    monkeypatch.setattr(ops_module("attention_torch"), "BLOCK", block)
    for name, x in run(tree_attention, inputs, parents, torch.float64, window=9).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-13)
