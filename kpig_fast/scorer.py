"""``KeyPartScorer``: response log-probs under the complete and the masked instruction, and the information gain."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn

from kpig_fast.data.encoding import EncodedPair, PromptEncoder
from kpig_fast.data.instances import as_instance
from kpig_fast.data.schema import Instance
from kpig_fast.method.gain import gains, scored_length
from kpig_fast.method.masking import MASK_TEXT
from kpig_fast.tree.model import position_limit
from kpig_fast.tree.proof import prove
from kpig_fast.tree.scoring import Branch, BranchScores, Layout, score_branches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoreStats:
    """What a scoring run did.

    ``tokens_naive`` counts the tokens of every prompt with its response, complete and masked, laid out apart;
    ``tokens`` those that were laid out in ``trees`` token trees; ``seconds`` is wall time, tokenization included.
    """

    tokens: int
    tokens_naive: int
    trees: int
    seconds: float


@dataclass(frozen=True)
class GainScores:
    """Scores of n instances, in the order in which they were given.

    Attributes:
        gain: float64 [n], the information gain G of each instance.
        complete: n float32 vectors [K_i], log p of the response tokens under the complete instruction; only of those
            that ``tail_tol`` asks for.
        masked: the same under the masked instruction.
        stats: tokens, trees and seconds.
        hidden: n tensors [full K_i, D] that predict the response under the masked instruction, if they were kept.
    """

    gain: Tensor
    complete: list[Tensor]
    masked: list[Tensor]
    stats: ScoreStats
    hidden: list[Tensor] = field(default_factory=list)


class KeyPartScorer:
    """Measures how much the key parts of an instruction help a model to its answer (He et al., ACL 2025, Eq. 1-3).

    Both instructions of all instances are laid out as token trees, so that what they share is computed once.

    Args:
        model: any Hugging Face causal language model, PEFT adapters included. It is proved first (a small tree against
            separate sequences) and is left as it was after each call.
        tokenizer: its tokenizer.
        alpha: decay of the gain, in (0, 1].
        tail_tol: error of G that leaving out late response tokens may cause; 0 scores every response token.
        max_tokens: tokens of one tree at most; halved when memory runs out.
        template: ``plain`` or ``chat``.
        mask_text: what stands for a key part.
        end_of_sequence: whether the end-of-sequence token counts as the last response token.

    Raises:
        UnsupportedModelError: the model does not give the same result on a token tree.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        alpha: float = 0.3,
        tail_tol: float = 1e-7,
        max_tokens: int = 8192,
        template: Literal["plain", "chat"] = "plain",
        mask_text: str = MASK_TEXT,
        end_of_sequence: bool = True,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; a tree needs room for at least one token")
        self.model = model
        self.alpha = alpha
        self.scored_length = scored_length(alpha, tail_tol)
        self.max_tokens = max_tokens
        self.encoder = PromptEncoder(tokenizer, template=template, mask_text=mask_text, end_of_sequence=end_of_sequence)
        prove(model)

    def encode(self, instance: Instance | Mapping[str, Any]) -> EncodedPair:
        """Token ids of one instance. Raises ValueError where a key part does not occur in the instruction."""
        return self.encoder.encode(as_instance(instance))

    def score(self, instances: Sequence[Instance | Mapping[str, Any]], progress: bool = False) -> GainScores:
        """Score instances, or rows in any form that ``as_instance`` takes.

        Raises:
            ValueError: a row is no instance, a key part does not occur, or a prompt is longer than the model's
                positions.
        """
        started = time.perf_counter()
        rows = [as_instance(row) for row in instances]
        pairs = self.encoder.encode_all(rows, progress=progress)
        self.check_positions(pairs, names_of(rows), whole=False)
        return self._score(pairs, started, progress, keep_hidden=False)

    def score_pairs(
        self, pairs: Sequence[EncodedPair], *, keep_hidden: bool = False, progress: bool = False
    ) -> GainScores:
        """Score instances that are token ids already; with ``keep_hidden`` also keep the masked hidden states.

        Raises:
            ValueError: a prompt is longer than the model's positions.
        """
        self.check_positions(pairs, whole=keep_hidden)
        return self._score(pairs, time.perf_counter(), progress, keep_hidden)

    def check_positions(
        self, pairs: Sequence[EncodedPair], names: Sequence[str] | None = None, *, whole: bool = True
    ) -> None:
        """Check that prompts and responses fit into the model's positions; only the scored part unless ``whole``.

        Raises:
            ValueError: one does not; the message names the first such instance.
        """
        limit = position_limit(self.model)
        for i, pair in enumerate(pairs):
            response = len(pair.response_ids) if whole else self._n_scored(pair.response_ids)
            # The last token predicts nothing.
            length = max(len(pair.complete_ids), len(pair.masked_ids)) + response - 1
            if limit is not None and response and length > limit:
                raise ValueError(
                    f"{names[i] if names else f'instance {i}'} needs {length} positions, but the model has {limit}; "
                    "shorten its context or drop it"
                )

    def _score(self, pairs: Sequence[EncodedPair], started: float, progress: bool, keep_hidden: bool) -> GainScores:
        branches: list[Branch] = []
        complete_of, masked_of = [], []
        for pair in pairs:
            masked_of.append(len(branches))
            branches.append(self._branch(pair.masked_ids, pair.response_ids, keep_hidden))
            # When nothing is masked, both sides are one branch: G = 0.0 exactly.
            if pair.complete_ids != pair.masked_ids:
                branches.append(self._branch(pair.complete_ids, pair.response_ids, False))
            complete_of.append(len(branches) - 1)
        layout = Layout()
        scores: list[BranchScores] = score_branches(
            self.model, branches, max_tokens=self.max_tokens, layout=layout, progress="scoring" if progress else None
        )
        complete = [scores[i].log_probs for i in complete_of]
        masked = [scores[i].log_probs for i in masked_of]
        naive = sum(len(p.complete_ids) + len(p.masked_ids) + 2 * len(p.response_ids) for p in pairs)
        return GainScores(
            gain=gains(complete, masked, self.alpha),
            complete=complete,
            masked=masked,
            stats=ScoreStats(layout.tokens, naive, layout.trees, time.perf_counter() - started),
            hidden=[scores[i].hidden for i in masked_of] if keep_hidden else [],
        )

    def _branch(self, prompt: Sequence[int], response: Sequence[int], keep_hidden: bool) -> Branch:
        return Branch(np.array([*prompt, *response], np.int32), len(prompt), self._n_scored(response), keep_hidden)

    def _n_scored(self, response: Sequence[int]) -> int:
        return len(response) if self.scored_length is None else min(self.scored_length, len(response))


def names_of(instances: Sequence[Instance]) -> list[str]:
    """How messages name each instance: by its id, else by its number."""
    return [instance.where if instance.id else f"instance {i}" for i, instance in enumerate(instances)]
