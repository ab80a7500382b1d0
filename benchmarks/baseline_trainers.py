"""What KPIG training is compared with: fine-tuning on packed sequences, and KPIG as its formulas read."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer

from kpig_fast.method.gain import gains
from kpig_fast.method.objective import temperature

Features = dict[str, list[int]]


class PackedTrainer(Trainer):
    """Fine-tuning on packs: sequences end to end, told apart by their positions; the head sees response rows only."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Cross-entropy of a pack, as its share of the mean over the optimizer batch."""
        labels = inputs.pop("labels")[:, 1:]
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        return self.cross_entropy(hidden[labels >= 0], model.lm_head, labels[labels >= 0]) / num_items_in_batch

    def cross_entropy(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        """Sum over response rows [N, D] and their labels [N]."""
        return F.cross_entropy(head(hidden), labels, reduction="sum")


def pack(sequences: Sequence[Features], size: int) -> list[Features]:
    """Sequences end to end in packs of at most ``size`` tokens; a longer sequence is a pack of its own."""
    packs: list[Features] = []
    for sequence in sequences:
        length = len(sequence["input_ids"])
        if not packs or len(packs[-1]["input_ids"]) + length > size:
            packs.append({"input_ids": [], "labels": [], "position_ids": []})
        for name, values in {**sequence, "position_ids": list(range(length))}.items():
            packs[-1][name].extend(values)
    return packs


def as_tensors(packs: Sequence[Features]) -> dict[str, Tensor]:
    """A batch of one pack."""
    (only,) = packs
    return {name: torch.tensor([values]) for name, values in only.items()}


class PairCollator:
    """Pads both sequences of each instance: the complete ones at the top, the masked ones under ``masked``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.collate = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, pairs: Sequence[tuple[Features, Features]]) -> dict[str, Any]:
        """``pairs``: the complete and the masked sequence of each instance."""
        complete, masked = zip(*pairs, strict=True)
        return {**self.collate(list(complete)), "masked": self.collate(list(masked))}


class StraightforwardTrainer(Trainer):
    """KPIG with the teacher in the loop: two padded passes of each model, full logits, the textbook divergence.

    Args:
        model: the student; a copy of it is the teacher.
        lam: weight of the divergence.
        alpha: decay of the gain.
        arguments: of ``transformers.Trainer``.
    """

    def __init__(self, model: LlamaForCausalLM, *, lam: float, alpha: float, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self.lam, self.alpha = lam, alpha

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Loss of a micro-batch (Eq. 5), as its share of the mean over the optimizer batch."""
        masked = inputs.pop("masked")
        teacher_logits, temperatures = self.ask_teacher(inputs, masked)
        p = (response_logits(model, masked) / temperatures).softmax(-1)
        q = (teacher_logits / temperatures).softmax(-1)
        m = (p + q) / 2
        divergence = (p * (p / m).log2() + q * (q / m).log2()).sum() / 2
        cross_entropy = model(**inputs, num_items_in_batch=num_items_in_batch).loss
        return cross_entropy + self.lam * divergence / num_items_in_batch

    @torch.no_grad()
    def ask_teacher(self, complete: dict[str, Tensor], masked: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The teacher's logits [N, V] at the masked response rows, and the temperature [N, 1] of each row."""
        is_response = complete["labels"] >= 0
        lengths, targets = is_response.sum(1), complete["labels"][is_response][:, None]
        both = response_logits(self.teacher, complete), response_logits(self.teacher, masked)
        log_probs = [z.log_softmax(-1).gather(1, targets)[:, 0].split(lengths.tolist()) for z in both]
        gain = gains(log_probs[0], log_probs[1], self.alpha)
        return both[1], temperature(gain).float().repeat_interleave(lengths)[:, None]


def response_logits(model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    """[N, V]: the rows of the full logits that predict a response token."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    return logits[:, :-1][inputs["labels"][:, 1:] >= 0]
