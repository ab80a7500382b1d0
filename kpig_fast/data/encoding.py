"""From instances to token ids: the prompt under the complete and the masked instruction, and one response for both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from kpig_fast.data.schema import Demonstration, Instance
from kpig_fast.data.templates import ChatTemplate, Ids, PlainTemplate, Question
from kpig_fast.method.masking import MASK_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one instance; the model reads a prompt, then the response.

    Args:
        complete_ids: the prompt with the complete instruction.
        masked_ids: the prompt with the masked instruction; equal to ``complete_ids`` when nothing is masked.
        response_ids: the response, the same after both prompts, its end-of-sequence token included.
    """

    complete_ids: Ids
    masked_ids: Ids
    response_ids: Ids


class PromptEncoder:
    """Turns instances into token ids with one tokenizer and one prompt template.

    Args:
        tokenizer: any Hugging Face tokenizer.
        template: ``plain`` (:class:`PlainTemplate`) or ``chat`` (:class:`ChatTemplate`).
        mask_text: what stands for a key part in the masked instruction.
        end_of_sequence: end every response with the end-of-sequence (chat: end-of-turn) token; an empty output is that
            token alone.

    Attributes:
        end_id: the token id that ends a response, at which generation stops; None where there is none.

    Raises:
        ValueError: unknown template, a tokenizer without chat template, or without end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template: Literal["plain", "chat"] = "plain",
        mask_text: str = MASK_TEXT,
        end_of_sequence: bool = True,
    ) -> None:
        if template not in ("plain", "chat"):
            raise ValueError(f"unknown template {template!r}; choose 'plain' or 'chat'")
        self.mask_text = mask_text
        self._template = PlainTemplate(tokenizer) if template == "plain" else ChatTemplate(tokenizer)
        self.end_id: int | None = self._template.end_id
        if end_of_sequence and self.end_id is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; "
                "set tokenizer.eos_token or pass end_of_sequence=False"
            )
        self._end = [self.end_id] if end_of_sequence and self.end_id is not None else []

    def encode(self, instance: Instance) -> EncodedPair:
        """The token ids of one instance. Raises as :meth:`encode_all`."""
        return self.encode_all([instance])[0]

    def encode_all(self, instances: Sequence[Instance], progress: bool = False) -> list[EncodedPair]:
        """The token ids of many instances, in their order.

        Raises:
            ValueError: a key part does not occur; or, with ``chat``, a prompt is no token prefix of its conversation
                or the response depends on the mask.
        """
        pairs: list[EncodedPair] = []
        with tqdm(total=len(instances), desc="tokenizing", unit="instance", disable=not progress) as bar:
            for start in range(0, len(instances), _CHUNK):
                chunk = instances[start : start + _CHUNK]
                pairs += self._encode_chunk(chunk)
                bar.update(len(chunk))
        return pairs

    def prompt(self, instruction: str, context: str = "", demonstrations: Sequence[Demonstration] = ()) -> Ids:
        """Prompt ids for generation; ``demonstrations`` are worked examples before the question."""
        return self._template.prompts([Question(instruction, context, demonstrations)])[0]

    def _encode_chunk(self, instances: Sequence[Instance]) -> Iterator[EncodedPair]:
        complete = [Question(i.instruction, i.context) for i in instances]
        masked = [Question(i.masked_instruction(self.mask_text), i.context) for i in instances]
        # Equal questions, such as those of an instance without key parts, are tokenized once.
        distinct = list(dict.fromkeys([*complete, *masked]))
        prompts = dict(zip(distinct, self._template.prompts(distinct), strict=True))
        responses = self._template.responses(instances, complete, [prompts[q] for q in complete])
        if self._template.depends_on_prompt:
            under_mask = self._template.responses(instances, masked, [prompts[q] for q in masked])
            _require_equal(instances, responses, under_mask)
        for a, b, response in zip(complete, masked, responses, strict=True):
            yield EncodedPair(list(prompts[a]), list(prompts[b]), response + self._end)


def _require_equal(instances: Sequence[Instance], complete: list[Ids], masked: list[Ids]) -> None:
    for instance, a, b in zip(instances, complete, masked, strict=True):
        if a != b:
            raise ValueError(
                f"{instance.where}: the chat template writes another response under the masked instruction than under "
                "the complete one; set tokenizer.chat_template to one whose assistant message does not depend on the "
                "user message, or use template='plain'"
            )
