"""The operators alone: against their bare matrix products and against what plain PyTorch offers for the same result.

``python benchmarks/bench_kernels.py --quick``; README.md beside this file says how to read it.
N rows, D hidden size, V vocabulary, T tokens of a tree, H heads, d head size. Everything is float32.
"""

import ctypes
import gc
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Seconds, race, ratios, report, require, run_options
from torch import Tensor

from kpig_fast.method.objective import jsd_bits
from kpig_fast.ops import linear_kpig_loss, response_logprob, tree_attention
from kpig_fast.ops.head import CHUNK_ELEMENTS
from kpig_fast.ops.reference import tree_mask
from kpig_fast.tree.layout import TokenTree, build

OURS, PRODUCTS = "ours", "its matrix products"
PLAIN, SDPA = "plain PyTorch", "SDPA with a dense mask"
CHUNK_ROWS = 64
LIBRARY = "F.linear_cross_entropy"
CHUNKED = f"{LIBRARY}, chunks of {CHUNK_ROWS} rows"
CE_SCALE, JSD_SCALE = 0.01, 0.02
# Relative to the largest entry of a result: float32 sums of thousands of terms in another order.
TOLERANCE = 2e-5
MB = 2**20

# Returns everything that it computed; the bare matrix products return nothing.
Run = Callable[[], tuple[Tensor, ...]]


@dataclass
class Figures:
    """What the benchmark has measured so far, by name."""

    seconds: Seconds = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)


def scoring_runs(n: int, d: int, v: int) -> dict[str, Run]:
    """Log-prob of each row's target, without a gradient."""
    hidden, weight, target = torch.randn(n, d), head(v, d), torch.randint(v, (n,))
    logits = torch.empty(n, v)

    def products() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.t(), out=logits)
        return ()

    def plain() -> tuple[Tensor, ...]:
        return (-F.cross_entropy(F.linear(hidden, weight), target, reduction="none"),)

    runs = {OURS: lambda: (response_logprob(hidden, weight, target),), PRODUCTS: products, PLAIN: plain}
    if hasattr(F, "linear_cross_entropy"):
        library = partial(F.linear_cross_entropy, hidden, weight, target, reduction="none")
        # Without options it is the plain form; chunks of its own choice have 1 or 8 rows here, many times slower.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS, chunking_method=None)
        runs[LIBRARY] = lambda: (-library(),)
        runs[CHUNKED] = lambda: (-library(options=options),)
    else:
        print(f"without {LIBRARY}, which torch {torch.__version__} does not have")
    return runs


def training_runs(n: int, d: int, v: int) -> dict[str, Run]:
    """Loss on n complete and n masked rows, and its gradient by both hidden states and by the head."""
    weight, ref_weight, target = head(v, d).requires_grad_(), head(v, d), torch.randint(v, (n,))
    hidden, masked, ref_hidden = (
        torch.randn(n, d).requires_grad_(),
        torch.randn(n, d).requires_grad_(),
        torch.randn(n, d),
    )
    temperature = torch.linspace(1, 2, n)
    z, r, dhidden, dweight = torch.empty(n, v), torch.empty(n, v), torch.empty(n, d), torch.empty(v, d)

    @torch.no_grad()
    def products() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(z, weight, out=dhidden)
        torch.mm(z.t(), hidden, out=dweight)
        torch.mm(masked, weight.t(), out=z)
        torch.mm(ref_hidden, ref_weight.t(), out=r)
        torch.mm(z, weight, out=dhidden)
        torch.addmm(dweight, z.t(), masked, out=dweight)
        return ()

    def with_gradient(loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, (hidden, masked, weight))

    def ours() -> tuple[Tensor, ...]:
        sides = hidden, target, masked, ref_hidden, temperature, weight, ref_weight
        return with_gradient(linear_kpig_loss(*sides, ce_scale=CE_SCALE, jsd_scale=JSD_SCALE).loss)

    def plain() -> tuple[Tensor, ...]:
        cross_entropy = F.cross_entropy(F.linear(hidden, weight), target, reduction="sum")
        divergence = jsd_bits(F.linear(masked, weight), F.linear(ref_hidden, ref_weight), temperature).sum()
        return with_gradient(CE_SCALE * cross_entropy + JSD_SCALE * divergence)

    return {OURS: ours, PRODUCTS: products, PLAIN: plain}


def attention_runs(tree: TokenTree, heads: int, d: int, *, train: bool) -> dict[str, Run]:
    """Attention on ``tree``; with ``train`` also the gradient by queries, keys and values. The mask is made untimed."""
    q, k, v = (torch.randn(heads, len(tree), d).requires_grad_(train) for _ in range(3))
    upstream = torch.randn(heads, len(tree), d)
    # [T, T]: with three dimensions SDPA would not take its flash kernel.
    mask = tree_mask(tree.subtree_end, tree.position_ids)

    def run(attend: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = attend()
        return out.detach(), *(torch.autograd.grad(out, (q, k, v), upstream) if train else ())

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]

    return {
        OURS: lambda: run(lambda: tree_attention(q, k, v, tree.subtree_end, tree.position_ids)),
        SDPA: lambda: run(dense),
    }


def head(v: int, d: int) -> Tensor:
    """[V, D]: weights that give logits with a standard deviation of 2 on standard normal hidden states."""
    return torch.randn(v, d).mul_(2 / d**0.5)


def instance_tree(path: int, branch: int, leaves: int, leaf: int) -> TokenTree:
    """One instruction's tree: ``path`` shared tokens, a complete and a masked branch, each with the same responses.

    Args:
        path: tokens before the first key part.
        branch: tokens of each branch.
        leaves: responses under each branch.
        leaf: rows of each response.
    """
    counter = iter(range(path + 2 * branch + leaves * (leaf + 1)))

    def tokens(n: int) -> list[int]:
        return [next(counter) for _ in range(n)]

    shared = tokens(path)
    prompts = [shared + tokens(branch) for _ in range(2)]
    # The last token of a response has no row.
    responses = [tokens(leaf + 1) for _ in range(leaves)]
    return build([prompt + response for prompt in prompts for response in responses], [path + branch] * 2 * leaves)


def measure(title: str, runs: Mapping[str, Run], arguments: Namespace, figures: Figures) -> None:
    """Require equal results, which also warms everything up; measure memory; then time in rounds."""
    print(title)
    expected = runs[OURS]()
    for name, run in runs.items():
        differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(run(), expected)]
        if differences and name != OURS:
            # Unlike Python's maximum, torch's keeps NaN.
            require(f"results of {name!r} differ by", float(torch.stack(differences).max()), TOLERANCE)
    del expected, differences
    for name, run in runs.items():
        if name != PRODUCTS:
            figures.megabytes[f"{title}: MB that {name} needs"] = extra_megabytes(run)
    seconds = race(
        {name: lambda run=run: run for name, run in runs.items()},
        arguments.rounds,
        processor_time=arguments.processor_time,
    )
    figures.seconds |= {f"{title}: {name}": values for name, values in seconds.items()}
    for name in runs:
        if name == PRODUCTS:
            figures.shares[f"{title}: the time of {name}"] = ratios(seconds, OURS, name)
        elif name != OURS:
            figures.shares[f"{title}: as fast as {name}"] = ratios(seconds, name, OURS)


def extra_megabytes(run: Run) -> float:
    """By how much the process's resident memory grows at most during ``run``, less the size of what it returns.

    Not only what torch allocates: kernels have buffers of their own. Linux with glibc; NaN elsewhere.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not clear.exists():
        return float("nan")

    def resident(field: str) -> float:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    gc.collect()
    trim(0)
    # Sets the peak back to what is resident now.
    clear.write_text("5")
    before = resident("VmRSS:")
    results = run()
    return max(0.0, resident("VmHWM:") - before - sum(result.nbytes for result in results) / MB)


def size(text: str) -> list[int]:
    """``896x151936`` -> [896, 151936]."""
    d, v = text.split("x")
    return [int(d), int(v)]


def main(command: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``command``: its options, default those of the command line."""
    options = run_options("The operators against bare matrix products and plain PyTorch.")
    options.add_argument("--sizes", nargs="+", type=size, metavar="DxV", help="hidden size x vocabulary of the heads")
    options.add_argument("--rows", type=int, default=256, help="rows of a head (default: %(default)s)")
    tree_sizes = "PATH", "BRANCH", "LEAVES", "LEAF"
    options.add_argument("--tree", nargs=4, type=int, metavar=tree_sizes, help="tokens of the tree; leaves a branch")
    options.add_argument("--heads", type=int, default=8, help="attention heads (default: %(default)s)")
    options.add_argument("--head-size", type=int, default=64, help="size of one (default: %(default)s)")
    options.set_defaults(threads=2, sizes=[[896, 151_936], [2048, 32_000]], tree=[256, 120, 30, 60])
    arguments = options.parse_args(command)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    figures = Figures()
    for d, v in arguments.sizes:
        at = f"D = {d}, V = {v}"
        with torch.no_grad():
            measure(f"scoring head, {at}", scoring_runs(arguments.rows, d, v), arguments, figures)
        title = f"training head, {at}"
        measure(title, training_runs(arguments.rows, d, v), arguments, figures)
        figures.megabytes[f"{title}: MB of a chunk"] = 4 * min(CHUNK_ELEMENTS, 2 * arguments.rows * v) / MB
    tree = instance_tree(*arguments.tree)
    for train in (False, True):
        title = f"attention on {len(tree)} tokens, {'forward and backward' if train else 'forward'}"
        runs = attention_runs(tree, arguments.heads, arguments.head_size, train=train)
        with torch.set_grad_enabled(train):
            measure(title, runs, arguments, figures)
    for name, value in figures.megabytes.items():
        print(f"| {name} | {value:.1f} |")
    report(arguments, figures.seconds, figures.shares, megabytes=figures.megabytes)


if __name__ == "__main__":
    main()
