"""Attention on forests of every shape: deeper than a chunk of keys, several blocks long, any head sizes and groups."""

import pytest
import torch
from attention_cases import arrays, assert_exact, attention_inputs, random_parents, run
from hypothesis import given, settings
from hypothesis import strategies as st

from kpig_fast._native import KEY_CHUNK, QUERY_BLOCK
from kpig_fast.ops import tree_attention
from kpig_fast.ops.reference import tree_attention_reference

EVERYTHING = {"scale": 0.2, "softcap": 3.0}

pytestmark = pytest.mark.usefixtures("path")


@given(
    tokens=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    jumps=st.sampled_from([0.01, 0.1, 0.5]),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    d=st.integers(1, 40),
    dv=st.integers(1, 40),
    window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.floats(0.5, 5),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_random_forests(
    tokens: int, seed: int, jumps: float, groups: int, kv_heads: int, d: int, dv: int, window: int | None,
    softcap: float | None, sinks: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    inputs = attention_inputs(tokens, heads=groups * kv_heads, kv_heads=kv_heads, d=d, dv=dv, seed=seed, sinks=sinks)
    parents = random_parents(tokens, seed, jumps)
    found = run(tree_attention, inputs, parents, dtype, window=window, softcap=softcap)
    exact = run(tree_attention_reference, inputs, parents, torch.float64, window=window, softcap=softcap)
    # Sums of up to 200 terms, and scores up to 30 whose rounding a weight multiplies: 2^10 roundings.
    tolerance = 2**10 * torch.finfo(dtype).eps
    for name, truth in exact.items():
        scale = max(1.0, float(truth.abs().max()))
        torch.testing.assert_close(found[name].double(), truth, rtol=0, atol=tolerance * scale)


def chain(tokens: int) -> list[int]:
    return list(range(-1, tokens - 1))


def comb(spine: int, tokens: int) -> list[int]:
    """A chain of ``spine`` tokens whose last one has responses of 30 tokens each."""
    return [token - 1 if token < spine or (token - spine) % 30 else spine - 1 for token in range(tokens)]


DEEP = {
    "a chain": chain(450),
    "a chain as long as a chunk": chain(KEY_CHUNK),
    "a chain one longer than a chunk": chain(KEY_CHUNK + 1),
    "a chain of a chunk and a block": chain(KEY_CHUNK + QUERY_BLOCK),
    "two chunks of ancestors, then branches": comb(400, 600),
    "a random one": random_parents(700, 5, jumps=0.003),
    "roots inside of a block": [*chain(420), -1, 420, -1, *range(422, 500)],
}


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 150}, {"sinks": True, **EVERYTHING}], ids=str)
@pytest.mark.parametrize("parents", DEEP.values(), ids=DEEP.keys())
def test_trees_deeper_than_a_chunk_of_keys(parents: list[int], options: dict) -> None:
    _, depths = arrays(parents)
    assert int(depths.max()) + 1 >= KEY_CHUNK
    inputs = attention_inputs(len(parents), heads=2, kv_heads=1, d=16, dv=16, sinks=options.get("sinks", False))
    assert_exact(inputs, parents, **{name: x for name, x in options.items() if name != "sinks"})


SIZES = [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (1, 1), (17, 33), (64, 32), (40, 200)]


@pytest.mark.parametrize("options", [{}, {"window": 100, **EVERYTHING}], ids=str)
@pytest.mark.parametrize(("d", "dv"), SIZES)
def test_head_sizes(d: int, dv: int, options: dict) -> None:
    inputs = attention_inputs(210, heads=3, kv_heads=3, d=d, dv=dv, sinks=True)
    assert_exact(inputs, random_parents(210, d, jumps=0.02), **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (8, 2), (3, 3), (20, 20), (32, 4)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    assert_exact(attention_inputs(70, heads=heads, kv_heads=kv_heads, sinks=True), random_parents(70, 3))
