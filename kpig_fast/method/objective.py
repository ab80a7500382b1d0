"""The training objective (He et al., ACL 2025, Eq. 4-5), as its plain statement.

    L = CE(complete instance) + lambda JSD(softmax(z_student / beta) || softmax(z_teacher / beta))
    beta = 2 - min(G, 1)

Letters: N response rows; V vocabulary; z logits at the masked instance; G the gain, a constant of the teacher.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from torch import Tensor


@overload
def temperature(gain: float) -> float: ...
@overload
def temperature(gain: Tensor) -> Tensor: ...
def temperature(gain: float | Tensor) -> float | Tensor:
    """beta = 2 - min(G, 1) >= 1 of a gain or of a tensor of gains: the less key parts tell, the softer the target."""
    return 2 - (min(gain, 1.0) if isinstance(gain, (int, float)) else gain.clamp(max=1))


def jsd_bits(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Jensen-Shannon divergence of each row, base 2, in [0, 1] up to rounding.

    With p, q the two distributions and m their mean, p / m = 2 sigmoid(log p - log q): no probability is divided, so
    none may underflow, and each side keeps its own relative precision where they lie far apart.

    Args:
        student_logits: [..., V]; half precision is raised to float32 first.
        teacher_logits: [..., V]; -inf excludes a token.
        temperature: beta > 0, a number or one per row [...].

    Returns:
        [...], float64 for float64 logits, else float32; differentiable in everything given.
    """
    import torch
    import torch.nn.functional as F

    def log_probs(logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        beta = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).unsqueeze(-1)
        # A floor instead of -inf: 0 * floor is 0 below, where 0 * inf is NaN.
        return F.log_softmax(logits / beta, dim=-1).clamp(min=-1e30)

    log_p, log_q = log_probs(student_logits), log_probs(teacher_logits)
    log_p_to_m = math.log(2) + F.logsigmoid(log_p - log_q)
    log_q_to_m = math.log(2) + F.logsigmoid(log_q - log_p)
    return (log_p.exp() * log_p_to_m + log_q.exp() * log_q_to_m).sum(-1) / (2 * math.log(2))


def kpig_loss(token_log_probs: Tensor, jsd: Tensor, lam: float, n_response_tokens: int | Tensor) -> Tensor:
    """L = (-sum of ``token_log_probs`` + ``lam`` * sum of ``jsd``) / ``n_response_tokens``, a scalar (Eq. 5).

    Args:
        token_log_probs: student's log p of the response tokens, complete instance [N], nats.
        jsd: divergence at the response rows of the masked instance [N], bits.
        lam: weight of the divergence.
        n_response_tokens: response tokens of the whole optimizer batch (all micro-batches, all ranks), so that the
            losses of the parts add up to the loss of the whole however the batch is cut.
    """
    return (lam * jsd.sum() - token_log_probs.sum()) / n_response_tokens
