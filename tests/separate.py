"""Scores of separate sequences through a model's own forward: what the package is held to."""

import torch
from torch import Tensor, nn

from kpig_fast import EncodedPair, GainScores
from kpig_fast.method.gain import gains


def apart(lm: nn.Module, prompts: list[list[int]], responses: list[list[int]], batch: int = 32) -> list[Tensor]:
    """log p of the responses through the model's own forward: each sequence a row of its own, padded on the right."""
    found: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, len(prompts), batch):
            pairs = list(zip(prompts[first : first + batch], responses[first : first + batch]))
            width = max(len(p) + len(r) for p, r in pairs)
            ids = torch.tensor([[*p, *r] + [0] * (width - len(p) - len(r)) for p, r in pairs])
            mask = torch.tensor([[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in pairs])
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, (p, r) in zip(logits, pairs):
                log_p = row[len(p) - 1 : len(p) - 1 + len(r)].log_softmax(-1)
                found.append(log_p.gather(1, torch.tensor(r, dtype=torch.int64)[:, None])[:, 0])
    return found


def score_apart(lm: nn.Module, pairs: list[EncodedPair], alpha: float = 0.3) -> GainScores:
    """The same scores without any of the package's model code."""
    responses = [pair.response_ids for pair in pairs]
    complete = apart(lm, [pair.complete_ids for pair in pairs], responses)
    masked = apart(lm, [pair.masked_ids for pair in pairs], responses)
    return GainScores(gains(complete, masked, alpha), complete, masked, stats=None)  # type: ignore[arg-type]


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Over the leading tokens that were scored."""
    return max(float((f - e[: len(f)]).abs().max()) for f, e in zip(found, exact, strict=True) if len(f))
