"""Public heads that the GPU benchmark compares ours with; each is left out, with a line, where it is not installed.

N rows, D hidden size, V vocabulary. All of one temperature 1, since none but ours takes one for each row.
A cross-entropy is the negative sum of log-probs; a divergence is the sum over the rows, in bits.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kpig_fast.method.objective import jsd_bits

CHUNKS = 8
LN2 = math.log(2)

# hidden [N, D], weight [V, D], target [N] -> loss [] with its graph
CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
# hidden, weight, reference's hidden and weight -> loss []
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# hidden, weight, target -> log-probs [N], without a graph
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


def found(peers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Those of the peers that are installed; each is given as what imports it and returns the contestant."""
    kept: dict[str, Any] = {}
    for name, make in peers.items():
        try:
            kept[name] = make()
        except (ImportError, AttributeError) as missing:
            print(f"without {name}: {missing}")
    return kept


def cross_entropies() -> dict[str, CrossEntropy]:
    """Cross-entropies with a gradient."""
    return found({
        "Liger fused linear cross-entropy": _liger_cross_entropy,
        "cut-cross-entropy": _cut_cross_entropy,
        "TRL fused head": _trl_cross_entropy,
        "F.linear_cross_entropy": lambda: partial(F.linear_cross_entropy, reduction="sum"),
        "torch.compile, 8 chunks": lambda: compiled_cross_entropy,
    })  # fmt: skip


def divergences() -> dict[str, Divergence]:
    """Divergences with a gradient."""
    return found({
        "Liger fused_linear_jsd (Triton)": _liger_divergence,
        "Liger chunked JSD (torch.compile)": _liger_chunked_divergence,
        "torch.compile, 8 chunks": lambda: compiled_divergence,
    })  # fmt: skip


def scorers() -> dict[str, LogProbs]:
    """Log-probs without a gradient."""
    return found({
        "plain PyTorch": lambda: plain_log_probs,
        "F.linear_cross_entropy": lambda: _negative(partial(F.linear_cross_entropy, reduction="none")),
        "cut-cross-entropy": lambda: _negative(partial(_cut_cross_entropy(), reduction="none")),
        "TRL fused head": _trl_log_probs,
    })  # fmt: skip


def plain_log_probs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Full logits in the model's dtype, log-softmax in float32."""
    return -F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")


@torch.compile
def _cross_entropy_chunk(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")


def compiled_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Eight chunks of rows, compiled, their logits formed again in the backward pass."""
    parts = zip(hidden.chunk(CHUNKS), target.chunk(CHUNKS))
    losses = [checkpoint(_cross_entropy_chunk, h, weight, t, use_reentrant=False) for h, t in parts]
    return torch.stack(losses).sum()  # type: ignore[arg-type]


@torch.compile
def _divergence_chunk(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    ones = torch.ones(len(hidden), device=hidden.device)
    return jsd_bits(F.linear(hidden, weight).float(), F.linear(ref_hidden, ref_weight).float(), ones).sum()


def compiled_divergence(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """The same of the divergence."""
    parts = zip(hidden.chunk(CHUNKS), ref_hidden.chunk(CHUNKS))
    losses = [checkpoint(_divergence_chunk, h, weight, r, ref_weight, use_reentrant=False) for h, r in parts]
    return torch.stack(losses).sum()  # type: ignore[arg-type]


def _negative(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LogProbs:
    return lambda hidden, weight, target: -loss(hidden, weight, target)


def _liger_cross_entropy() -> CrossEntropy:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        out = fused(hidden, weight, target, reduction="sum", accum_dtype=torch.float32)
        return out[0] if isinstance(out, tuple) else out

    return loss


def _cut_cross_entropy() -> Any:
    from cut_cross_entropy import linear_cross_entropy

    # Its default leaves out small gradients.
    return partial(linear_cross_entropy, reduction="sum", filter_eps=None)


def _trl_log_probs() -> LogProbs:
    from trl.kernels import ChunkedLogProbFunction

    # Temperature, columns of a tile as its trainers take them, soft-cap, scale, further outputs.
    options = 1.0, 32768, None, 1.0, ()
    return lambda hidden, weight, target: ChunkedLogProbFunction.apply(hidden, weight, None, target, *options)[0]


def _trl_cross_entropy() -> CrossEntropy:
    log_probs = _trl_log_probs()
    return lambda hidden, weight, target: -log_probs(hidden, weight, target).sum()


def _liger_divergence() -> Divergence:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd as fused

    def loss(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        # A mean over the rows, in nats.
        mean = fused(hidden, weight, ref_hidden, ref_weight, accum_dtype=torch.float32)
        return mean * (len(hidden) / LN2)

    return loss


def _liger_chunked_divergence() -> Divergence:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)

    def loss(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        target = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        return fused(hidden, weight, ref_hidden, ref_weight, target) * (len(hidden) / LN2)

    return loss
