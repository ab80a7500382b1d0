"""The operators, each with a plain reference in ``kpig_fast.ops.reference``. They know nothing of models."""

from kpig_fast.ops.linear_jsd import linear_jsd
from kpig_fast.ops.linear_kpig_loss import KPIGLoss, linear_kpig_loss
from kpig_fast.ops.response_logprob import response_logprob
from kpig_fast.ops.tree_attention import tree_attention

__all__ = ["KPIGLoss", "linear_jsd", "linear_kpig_loss", "response_logprob", "tree_attention"]
