"""Attention on a token tree, of the GPU benchmark: against FlexAttention and against SDPA with a dense mask."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_gpu_common import Bench, Run, difference
from bench_kernels import instance_tree
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kpig_fast.ops import tree_attention
from kpig_fast.ops.reference import tree_attention_reference, tree_mask
from kpig_fast.tree.layout import TokenTree

TOLERANCE = 1e-2


class Case:
    """Queries, keys, values and an upstream gradient on a tree; grouped heads."""

    def __init__(self, bench: Bench, tree: TokenTree, heads: int, kv_heads: int, d: int) -> None:
        generator = torch.Generator(bench.device).manual_seed(0)

        def normal(n: int) -> Tensor:
            drawn = torch.randn(len(tree), n, d, generator=generator, device=bench.device, dtype=bench.dtype)
            return drawn.transpose(0, 1)

        self.q, self.k, self.v = (normal(n).requires_grad_() for n in (heads, kv_heads, kv_heads))
        self.upstream = normal(heads)
        self.ends, self.depths = tree.subtree_end.to(bench.device), tree.position_ids.to(bench.device)
        self.groups = heads // kv_heads

    def run(self, attend: Callable[[], Tensor], *, train: bool) -> Run:
        """Forward, or forward and backward."""

        def both() -> tuple[Tensor, ...]:
            out = attend()
            return out.detach(), *torch.autograd.grad(out, (self.q, self.k, self.v), self.upstream)

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(),)

        return both if train else forward

    def ours(self) -> Tensor:
        """Our operator."""
        return tree_attention(self.q, self.k, self.v, self.ends, self.depths)

    def exact(self) -> Tensor:
        """Plain attention in float32."""
        sides = (x.float() for x in (self.q, self.k, self.v))
        return tree_attention_reference(*sides, self.ends, self.depths).to(self.q.dtype)

    def dense(self) -> Callable[[], Tensor]:
        """SDPA with the dense mask, which is made untimed; keys and values repeated, as layers do it with a mask."""
        mask = tree_mask(self.ends, self.depths)

        def run() -> Tensor:
            k, v = (x.repeat_interleave(self.groups, 0)[None] for x in (self.k, self.v))
            return F.scaled_dot_product_attention(self.q[None], k, v, attn_mask=mask)[0]

        return run

    def flex(self) -> Callable[[], Tensor]:
        """FlexAttention, compiled; the mask of blocks is made anew in each call, since each tree is another one."""
        attend, ends, tokens = torch.compile(flex_attention), self.ends, len(self.ends)

        def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (q < ends[k])

        def run() -> Tensor:
            blocks = create_block_mask(visible, None, None, tokens, tokens, device=str(ends.device), _compile=True)
            sides = (x[None] for x in (self.q, self.k, self.v))
            return attend(*sides, block_mask=blocks, enable_gqa=self.groups > 1)[0]  # type: ignore[index]

        return run


def attention(bench: Bench) -> None:
    """8192 tokens with 60 leaves: a shared start, a complete and a masked branch, 30 responses under each."""
    tree = instance_tree(*bench.pick((512, 240, 30, 120), (16, 8, 3, 4)))
    sizes = bench.pick((32, 8, 128), (4, 2, 16))
    few = Case(bench, instance_tree(64, 30, 5, 20), *sizes)
    for train in (False, True):
        error = difference(few.run(few.ours, train=train)(), few.run(few.exact, train=train)())
        if not error <= TOLERANCE:
            raise ValueError(f"our attention is off by {error:.2e}, relative; at most {TOLERANCE} is allowed")
        way = "forward and backward" if train else "forward"
        case = f"attention on {len(tree)} tokens, {sizes[0]} / {sizes[1]} heads of {sizes[2]}, {way}"
        compare(bench, case, Case(bench, tree, *sizes), train=train)


def compare(bench: Bench, case: str, x: Case, *, train: bool) -> None:
    """Time ours and the others, and hold the ratios against their targets."""
    ours = x.run(x.ours, train=train)
    took = bench.milliseconds(ours)
    bench.add(case, "ours", ms=took, mb=bench.megabytes(ours))
    others = {"SDPA with a dense mask": x.run(x.dense(), train=train)}
    if bench.device == "cuda":
        others["FlexAttention, its mask included"] = x.run(x.flex(), train=train)
    times = bench.compare(case, others, ours, 3 * TOLERANCE)
    for name, factor in (("SDPA with a dense mask", 5), ("FlexAttention, its mask included", 1.2)):
        if name in times:
            bench.target(case, f"as fast as {name}", times[name] / took, at_least=factor)
