"""Scoring in Triton: a head's logits are formed, summed and forgotten inside of one kernel, for GPUs.

    top[n] = max_v z[n, v]      total[n] = sum_v exp(z[n, v] - top[n])      picked[n] = z[n, target[n]]

N rows, D hidden size, V vocabulary; z the logits of ``hidden @ weight.T``, which never reach memory.
A program takes a block of rows and a share of the vocabulary; programs that run at the same time go over the same
shares, so that a tile of the weight comes from memory once and from the L2 cache for every other block of rows.
Neither atomics nor a search for a configuration: the bits are the same in every run on one kind of GPU.
"""

# A kernel's compile-time arguments are given as plain values, which a checker does not expect.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
from torch import Tensor
from triton import knobs

from kpig_fast.ops.rows_triton import Transform, factors
from kpig_fast.ops.scoring_triton_kernels import score_kernel

MAX_HIDDEN = 1024
BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
# Programs of each multiprocessor, one after another: so many that the last ones to end keep few of them waiting.
PROGRAMS = 8


def takes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether ``score`` is to be preferred to a library's product and a pass over its tiles.

    A logit costs 2 D operations in the product, and a tile of them 8 bytes of traffic each. Up to D of about 1024 a GPU
    should need as long for the traffic as for the product; beyond, the library's faster product is worth more.
    """
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    return half and hidden.device.type == "cuda" and hidden.shape[1] <= MAX_HIDDEN


def score(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N]
    transform: Transform,
    top: Tensor,  # [N]
    total: Tensor,  # [N]
    picked: Tensor,  # [N]
    processors: int | None = None,
) -> None:
    """Fill float32 ``top``, ``total`` and ``picked``; for a target of -100 the last is 0.

    ``processors``: how many multiprocessors to share the work over, by default those of the GPU.
    """
    rows, d = hidden.shape
    if not rows:
        return
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    processors = processors or torch.cuda.get_device_properties(hidden.device).multi_processor_count
    tiles, splits = shares(rows, len(weight), processors)
    partials = top.new_empty(3, splits, rows)
    bias, inner, outer = factors(transform)
    score_kernel[(triton.cdiv(rows, BLOCK_M), splits)](
        hidden, weight, target, bias, partials, hidden.stride(0), weight.stride(0), rows, len(weight), tiles, d, inner,
        outer, WHOLE_K=d % BLOCK_K == 0, UPCAST=knobs.runtime.interpret, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K, num_warps=8, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    torch.amax(partials[0], 0, out=top)
    torch.sum(partials[1] * (partials[0] - top).exp_(), 0, out=total)
    torch.sum(partials[2], 0, out=picked)


def shares(rows: int, columns: int, processors: int) -> tuple[int, int]:
    """Tiles of a program's share of the vocabulary, and how many shares there are, none of them empty."""
    tiles = triton.cdiv(columns, BLOCK_N)
    splits = min(tiles, triton.cdiv(PROGRAMS * processors, triton.cdiv(rows, BLOCK_M)))
    share = triton.cdiv(tiles, splits)
    return share, triton.cdiv(tiles, share)
