"""Attention on random forests against the dense reference, and the reference against the definition of a tree."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import ops_module, relative
from torch import Tensor

from kpig_fast.ops import tree_attention
from kpig_fast.ops.reference import tree_attention_reference, tree_mask

VARIANTS = [
    {},
    {"window": 5},
    {"window": 2},
    {"softcap": 2.0},
    {"sinks": True},
    {"scale": 0.1, "window": 40, "softcap": 3.0, "sinks": True},
]
WANTED = ["q", "k", "v", "sinks"]

unhurried = settings(deadline=None, max_examples=40)


def random_parents(tokens: int, seed: int) -> list[int]:
    """Parents (-1: a root) in depth-first order: mostly chains, with jumps back to an ancestor or a new root."""
    generator = torch.Generator().manual_seed(seed)
    parents: list[int] = []
    path: list[int] = []
    for token in range(tokens):
        if path and float(torch.rand(1, generator=generator)) < 0.2:
            path = path[: int(torch.randint(len(path) + 1, (1,), generator=generator))]
        parents.append(path[-1] if path else -1)
        path = [*path, token]
    return parents


def arrays(parents: list[int]) -> tuple[Tensor, Tensor]:
    """``subtree_end`` and ``position_ids`` of a forest given by its parents."""
    ends, depths = list(range(1, len(parents) + 1)), []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    for token in reversed(range(len(parents))):
        if parents[token] >= 0:
            ends[parents[token]] = max(ends[parents[token]], ends[token])
    return torch.tensor(ends, dtype=torch.int32), torch.tensor(depths, dtype=torch.int32)


def attention_inputs(
    tokens: int, *, heads: int = 4, kv_heads: int = 2, d: int = 8, dv: int = 8, seed: int = 0, sinks: bool = False
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {"q": 2 * normal(heads, tokens, d), "k": normal(kv_heads, tokens, d), "v": normal(kv_heads, tokens, dv)}
    return inputs | ({"sinks": normal(heads)} if sinks else {})


def upstream(out: Tensor) -> Tensor:
    """A non-uniform gradient by the output, the same numbers in every dtype up to rounding."""
    steps = torch.arange(out.numel(), dtype=torch.float64)
    return ((steps * 0.37).sin().view(out.shape) + 0.3).to(out.dtype)


def run(function, inputs: dict[str, Tensor], parents: list[int], dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Output and all gradients."""
    leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in inputs.items()}
    ends, depths = arrays(parents)
    q, k, v = (leaves[name] for name in "qkv")
    out = function(q, k, v, ends, depths, sinks=leaves.get("sinks"), **options)
    out.backward(upstream(out))
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def assert_exact(inputs: dict[str, Tensor], parents: list[int], **options) -> None:
    """float64 equals the reference; float32 errs at most twice (gradients: three times) as far as the reference."""
    exact = run(tree_attention_reference, inputs, parents, torch.float64, **options)
    double = run(tree_attention, inputs, parents, torch.float64, **options)
    own = run(tree_attention_reference, inputs, parents, torch.float32, **options)
    found = run(tree_attention, inputs, parents, torch.float32, **options)
    assert set(found) == {"out", *inputs}
    for name, truth in exact.items():
        torch.testing.assert_close(double[name], truth, rtol=1e-11, atol=1e-12)
        assert found[name].shape == truth.shape
        if truth.numel():
            allowed = (2 if name == "out" else 3) * float((own[name] - truth).abs().max())
            # Terms of size 1 cancel in the gradient of a token that sees itself alone.
            allowed += 2 * 2**-23 * max(1, float(truth.abs().max()))
            assert float((found[name] - truth).abs().max()) <= allowed, name


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


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 500])
def test_sizes_around_the_block(tokens: int, options: dict) -> None:
    inputs = attention_inputs(tokens, sinks=options.get("sinks", False))
    assert_exact(inputs, random_parents(tokens, tokens), **{k: v for k, v in options.items() if k != "sinks"})


@given(
    tokens=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.floats(0.5, 5),
    sinks=st.booleans(),
)
@unhurried
def test_random_forests_in_small_blocks(
    tokens: int, seed: int, groups: int, kv_heads: int, window: int | None, softcap: float | None, sinks: bool
) -> None:
    inputs = attention_inputs(tokens, heads=groups * kv_heads, kv_heads=kv_heads, d=3, dv=5, seed=seed, sinks=sinks)
    parents = random_parents(tokens, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops_module("tree_attention"), "BLOCK", 7)
        found = run(tree_attention, inputs, parents, torch.float64, window=window, softcap=softcap)
    exact = run(tree_attention_reference, inputs, parents, torch.float64, window=window, softcap=softcap)
    for name, truth in exact.items():
        torch.testing.assert_close(found[name], truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_block_size_does_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, parents = attention_inputs(150), random_parents(150, 3)
    expected = run(tree_attention, inputs, parents, torch.float64, window=9)
    monkeypatch.setattr(ops_module("tree_attention"), "BLOCK", block)
    for name, x in run(tree_attention, inputs, parents, torch.float64, window=9).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-13)


def test_a_chain_is_causal_attention() -> None:
    inputs = attention_inputs(200, heads=4, kv_heads=4)
    found = run(tree_attention, inputs, list(range(-1, 199)), torch.float64)["out"]
    q, k, v = (inputs[name].double() for name in "qkv")
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_a_token_depends_on_its_ancestors_only() -> None:
    parents = random_parents(300, 1)
    inputs = attention_inputs(300)
    ends, depths = arrays(parents)
    mask = tree_mask(ends, depths)
    query = 250
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name in ("k", "v"):
        poisoned[name][:, ~mask[query]] = 1e4
    clean = tree_attention(*inputs.values(), ends, depths)[:, query]
    assert 1 < int(mask[query].sum()) < query
    torch.testing.assert_close(tree_attention(*poisoned.values(), ends, depths)[:, query], clean)


def test_large_scores_and_sinks_stay_finite() -> None:
    inputs = attention_inputs(140, sinks=True)
    inputs["q"] *= 1e4
    inputs["sinks"] *= 1e4
    parents = random_parents(140, 2)
    found = run(tree_attention, inputs, parents, torch.float32)
    exact = run(tree_attention_reference, inputs, parents, torch.float64)
    assert all(torch.isfinite(x).all() for x in found.values())
    # Scores near 1e4 are rounded by 1e-3 in float32.
    assert relative(found["out"], exact["out"]) < 1e-2


def test_bf16_inputs_are_summed_in_float32() -> None:
    parents = random_parents(300, 4)
    inputs = {name: x.bfloat16() for name, x in attention_inputs(300, sinks=True).items()}
    found = run(tree_attention, inputs, parents, torch.bfloat16)
    wide = run(tree_attention, inputs, parents, torch.float32)
    assert torch.equal(found["out"], wide["out"].bfloat16())
    for name, x in found.items():
        assert x.dtype == torch.bfloat16
        # The upstream gradient and the output are rounded to bf16 on the way.
        assert relative(x.float(), wide[name].double()) < 1e-2


def test_strided_inputs_as_layers_pass_them() -> None:
    inputs, parents = attention_inputs(150), random_parents(150, 5)
    ends, depths = arrays(parents)
    plain = run(tree_attention, inputs, parents, torch.float32)
    # [1, T, H, d] transposed to [1, H, T, d], as every layer does.
    leaves = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs.values()]
    assert not any(x.is_contiguous() for x in leaves)
    out = tree_attention(*leaves, ends.repeat_interleave(2)[::2], depths.long())
    torch.testing.assert_close(out, plain["out"])
    grad = upstream(out).transpose(0, 1).contiguous().transpose(0, 1)
    for found, name in zip(torch.autograd.grad(out, leaves, grad), "qkv"):
        torch.testing.assert_close(found, plain[name])


@pytest.mark.parametrize("wanted", [["q"], ["k"], ["v"], ["sinks"], []], ids=str)
def test_only_what_is_wanted_gets_a_gradient(wanted: list[str]) -> None:
    inputs = attention_inputs(30, sinks=True)
    ends, depths = arrays(random_parents(30, 6))
    leaves = {name: x.requires_grad_(name in wanted) for name, x in inputs.items()}
    out = tree_attention(**leaves, subtree_end=ends, position_ids=depths)
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.sum().backward()
    assert [name for name, x in leaves.items() if x.grad is not None] == wanted


def test_backward_runs_twice_over_one_graph() -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(140).values()]
    out = tree_attention(*inputs, *arrays(random_parents(140, 7)))
    first = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    second = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 1.5}])
def test_gradcheck(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module("tree_attention"), "BLOCK", 4)
    tensors = attention_inputs(9, d=2, dv=3, sinks=True)
    inputs = [tensors[name].double().requires_grad_() for name in WANTED]
    ends, depths = arrays(random_parents(9, 8))

    def with_tree(function):
        return lambda q, k, v, sinks: function(q, k, v, ends, depths, sinks=sinks, **options)

    assert torch.autograd.gradcheck(with_tree(tree_attention), inputs)
    assert torch.autograd.gradgradcheck(with_tree(tree_attention_reference), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 6, 7)}, r"needs q \[H, T, d\] and k, v \[Hkv, T, d\] of one tree; got \[4, 6, 8\]"),
        ({"q": torch.zeros(1, 4, 6, 8)}, r"of one tree; got \[1, 4, 6, 8\]"),
        ({"v": torch.zeros(1, 6, 8)}, "of one tree"),
        ({"v": torch.zeros(2, 6)}, "of one tree"),
        ({"q": torch.zeros(3, 6, 8)}, "3 query heads are no multiple of 2 key/value heads"),
        ({"subtree_end": torch.zeros(5, dtype=torch.int32)}, r"need shape \[6\]; got \[5\], \[6\]"),
        ({"position_ids": torch.zeros(1, 6, dtype=torch.int32)}, r"need shape \[6\]; got \[6\], \[1, 6\]"),
        ({"sinks": torch.zeros(2)}, r"sinks need shape \[4\]; got \[2\]"),
        ({"window": 0}, "window is 0; a token sees at least itself"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    ends, depths = arrays(random_parents(6, 0))
    good = attention_inputs(6) | {"subtree_end": ends, "position_ids": depths}
    with pytest.raises(ValueError, match=message):
        tree_attention(**(good | change))


def test_constants_of_a_sink() -> None:
    # Without any key worth looking at, the sink takes nearly everything; at minus infinity it takes nothing.
    inputs, (ends, depths) = attention_inputs(20), arrays(random_parents(20, 9))
    plain = tree_attention(**inputs, subtree_end=ends, position_ids=depths)
    without = tree_attention(**inputs, subtree_end=ends, position_ids=depths, sinks=torch.full((4,), -math.inf))
    torch.testing.assert_close(without, plain)
    taken = tree_attention(**inputs, subtree_end=ends, position_ids=depths, sinks=torch.full((4,), 50.0))
    assert float(taken.abs().max()) < 1e-9
