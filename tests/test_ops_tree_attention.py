"""Attention on a token tree against the dense reference, on every path."""

import math

import pytest
import torch
from attention_cases import WANTED, arrays, assert_exact, attention_inputs, random_parents, run, upstream
from ops_cases import relative

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

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 129, 500])
def test_sizes_around_the_block(tokens: int, options: dict) -> None:
    inputs = attention_inputs(tokens, sinks=options.get("sinks", False))
    assert_exact(inputs, random_parents(tokens, tokens), **{k: v for k, v in options.items() if k != "sinks"})


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
def test_gradcheck(options: dict) -> None:
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
