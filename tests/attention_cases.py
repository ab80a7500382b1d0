"""Random forests and attention inputs on them, and how far from float64 a result may lie."""

import torch
from torch import Tensor

from kpig_fast.ops import tree_attention
from kpig_fast.ops.reference import tree_attention_reference

WANTED = ["q", "k", "v", "sinks"]


def random_parents(tokens: int, seed: int, jumps: float = 0.2) -> list[int]:
    """Parents (-1: a root) in depth-first order: chains, with ``jumps`` a token to an ancestor or a new root."""
    generator = torch.Generator().manual_seed(seed)
    parents: list[int] = []
    path: list[int] = []
    for token in range(tokens):
        if path and float(torch.rand(1, generator=generator)) < jumps:
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
    """float32 q [heads, tokens, d], k [kv_heads, tokens, d], v [kv_heads, tokens, dv] and perhaps sinks [heads]."""
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
