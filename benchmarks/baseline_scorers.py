"""What scoring on token trees is compared with: two passes over padded batches, four ways through the head.

B sequences of a batch, L their padded length. Labels are token ids at response tokens and ``IGNORE`` elsewhere.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import Setting, labelled
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM

from kpig_fast import EncodedPair
from kpig_fast.ops.reference import IGNORE

FULL, FUSED = "padded, full logits, in given order", "padded, TRL's fused head, in given order"
# Without a GPU, TRL projects every position, too.
SLOW = {FULL, FUSED}

Features = dict[str, list[int]]
# Pads sequences to a batch with ``labels``.
Collate = Callable[[list[Features]], dict[str, Tensor]]
# Padded inputs and labels [B, L] -> log-probs of the response tokens, sequence after sequence.
LogProbs = Callable[[dict[str, Tensor], Tensor], Tensor]
# Log-probs of the response tokens of every instance, under the complete and under the masked instruction.
Scores = tuple[list[Tensor], list[Tensor]]


def picked(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of the labels that count, of logits [B, n, V] and the labels [B, n] that they predict."""
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels >= 0]


def full_logits(model: LlamaForCausalLM, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """From the logits of every position."""
    return picked(model(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:])


def last_logits(model: LlamaForCausalLM, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """From the logits of the last columns, which hold the responses (:func:`responses_last`)."""
    width = int((labels >= 0).any(0).sum())
    # One column more predicts the first response token; the last one predicts nothing.
    logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    return picked(logits, labels[:, -width:])


def response_rows(model: LlamaForCausalLM, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """From the logits of the positions that predict a response token, only."""
    labels = labels[:, 1:]
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return picked(model.lm_head(hidden[labels >= 0]), labels[labels >= 0])


def fused_head(model: LlamaForCausalLM, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """From TRL's fused head, as its trainers call it; ``model`` has been given one."""
    return model(**inputs, labels=labels, fused_lm_head=True).log_probs[labels[:, 1:] >= 0]


def with_fused_head(model: LlamaForCausalLM) -> LlamaForCausalLM | None:
    """The model with TRL's fused head, weights shared, itself unchanged; None, and a line, where TRL has none."""
    try:
        from trl.trainer import add_fused_lm_head
    except ImportError:
        print("without TRL's fused head, which needs: pip install 'trl>=1.16'")
        return None
    patched = copy.copy(model)
    add_fused_lm_head(patched)
    return patched


def responses_last(sequences: list[Features], pad: int) -> dict[str, Tensor]:
    """A batch [B, L] whose prompts are padded on the left and whose responses are padded on the right."""
    starts = [sequence["labels"].count(IGNORE) for sequence in sequences]

    def joined(rows: list[list[int]], fill: int) -> Tensor:
        prompts = [torch.tensor(row[:start]) for row, start in zip(rows, starts)]
        responses = [torch.tensor(row[start:]) for row, start in zip(rows, starts)]
        left = pad_sequence(prompts, batch_first=True, padding_value=fill, padding_side="left")
        return torch.cat([left, pad_sequence(responses, batch_first=True, padding_value=fill)], 1)

    mask = joined([[1] * len(sequence["input_ids"]) for sequence in sequences], 0)
    return {
        "input_ids": joined([sequence["input_ids"] for sequence in sequences], pad),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": joined([sequence["labels"] for sequence in sequences], IGNORE),
    }


@torch.inference_mode()
def padded(
    pairs: Sequence[EncodedPair], collate: Collate, log_probs: LogProbs, *, batch: int, by_length: bool
) -> Scores:
    """Two passes over padded batches with SDPA, every response token scored.

    Args:
        pairs: the instances.
        collate: pads a batch.
        log_probs: scores it.
        batch: sequences of a batch.
        by_length: batches of similar lengths, so that little is padded, instead of the order of ``pairs``.
    """

    def one_pass(sequences: list[Features]) -> list[Tensor]:
        order = list(range(len(sequences)))
        if by_length:
            order.sort(key=lambda i: len(sequences[i]["input_ids"]))
        scores: dict[int, Tensor] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            inputs = dict(collate([sequences[i] for i in part]))
            labels = inputs.pop("labels")
            scores |= zip(part, log_probs(inputs, labels).split([len(pairs[i].response_ids) for i in part]))
        return [scores[i] for i in range(len(sequences))]

    return (
        one_pass([labelled(pair.complete_ids, pair.response_ids) for pair in pairs]),
        one_pass([labelled(pair.masked_ids, pair.response_ids) for pair in pairs]),
    )


def padded_runs(s: Setting, pairs: Sequence[EncodedPair], batch: int) -> dict[str, Callable[[], Scores]]:
    """The padded contestants by name: what people run in the given order, the fastest also sorted by length."""
    right: Any = DataCollatorForSeq2Seq(s.tokenizer)
    last = partial(responses_last, pad=s.tokenizer.pad_token_id)

    def run(collate: Collate, log_probs: LogProbs, *, by_length: bool) -> Callable[[], Scores]:
        return partial(padded, pairs, collate, log_probs, batch=batch, by_length=by_length)

    runs = {
        FULL: run(right, partial(full_logits, s.model), by_length=False),
        "padded, logits_to_keep, in given order": run(last, partial(last_logits, s.model), by_length=False),
        "padded, logits_to_keep, sorted by length": run(last, partial(last_logits, s.model), by_length=True),
        "padded, response rows, sorted by length": run(right, partial(response_rows, s.model), by_length=True),
    }
    if (patched := with_fused_head(s.model)) is not None:
        runs[FUSED] = run(right, partial(fused_head, patched), by_length=False)
    return runs
