"""How a question becomes prompt ids, and an answer the response ids that follow them: plain text or chat turns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kpig_fast.data.schema import Demonstration, Instance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


class Question(NamedTuple):
    """What a prompt asks: the instruction, its context (may be empty) and worked examples before it."""

    instruction: str
    context: str = ""
    demonstrations: Sequence[Demonstration] = ()


class PlainTemplate:
    """``instruction``, ``Input: context`` (left out when empty), ``Output:``, with a blank line between them.

    Demonstrations stand between the instruction and the question in the same form. The response is the output after
    one space. It is tokenized after ``Output:`` alone, hence the same under every prompt.
    """

    depends_on_prompt = False

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._lead = _tokenize(tokenizer, ["Output:"])[0]
        self.end_id = _end_of_sequence_id(tokenizer)

    def prompts(self, questions: Sequence[Question]) -> list[Ids]:
        """Prompt ids of every question, with the special tokens that the tokenizer puts at the start."""
        texts = [self.text(*question) for question in questions]
        prompts = _tokenize(self._tokenizer, texts, add_special_tokens=True)
        # Some tokenizers close every text with the end-of-sequence token; a prompt goes on.
        return [ids[:-1] if ids[-1] == self.end_id else ids for ids in prompts]

    def responses(self, instances: Sequence[Instance], _questions: object, _prompts: object) -> list[Ids]:
        """Response ids of every instance, without end-of-sequence token; none for an empty output."""
        texts = [f" {instance.output}" if instance.output else "" for instance in instances]
        rows = _tokenize(self._tokenizer, [f"Output:{text}" for text in texts])
        return [self._after_lead(ids, text) for ids, text in zip(rows, texts, strict=True)]

    def _after_lead(self, ids: Ids, text: str) -> Ids:
        if ids[: len(self._lead)] == self._lead:
            return ids[len(self._lead) :]
        # The tokenizer merges across the border between prompt and response.
        return _tokenize(self._tokenizer, [text])[0]

    @staticmethod
    def text(instruction: str, context: str, demonstrations: Sequence[Demonstration]) -> str:
        """The prompt of a question as text."""

        def ask(context: str) -> str:
            return f"Input: {context}\n\nOutput:" if context else "Output:"

        worked = [f"{ask(example.context)} {example.output}" for example in demonstrations]
        return "\n\n".join([instruction, *worked, ask(context)])


class ChatTemplate:
    """The tokenizer's own chat template: instruction, blank line and context are the user message.

    Demonstrations are earlier turns of the same form. The response is what the template writes for the assistant
    message after its generation prompt, up to the end-of-turn token: the first control token after the answer, or the
    end-of-sequence token where the template writes none.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    depends_on_prompt = True

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; "
                "set tokenizer.chat_template or use template='plain'"
            )
        self._tokenizer = tokenizer
        probe = self._render([[_message("user", "question"), _message("assistant", "answer")]])[0]
        closing = probe[probe.rindex("answer") + len("answer") :]
        kept, self.end_id = _end_of_turn(tokenizer, closing)
        self._cut = closing[len(kept) :]

    def prompts(self, questions: Sequence[Question]) -> list[Ids]:
        """Prompt ids of every question, the template's generation prompt included."""
        texts = self._render([self.messages(*question) for question in questions], add_generation_prompt=True)
        return _tokenize(self._tokenizer, texts)

    def responses(
        self, instances: Sequence[Instance], questions: Sequence[Question], prompts: Sequence[Ids]
    ) -> list[Ids]:
        """Response ids of every instance under its question, without end-of-turn token.

        Raises:
            ValueError: a prompt is no token prefix of its conversation.
        """
        answered = zip(instances, questions, strict=True)
        texts = self._render([[*self.messages(*q), _message("assistant", i.output)] for i, q in answered])
        rows = _tokenize(self._tokenizer, [text.removesuffix(self._cut) for text in texts])
        return [self._after_prompt(*row) for row in zip(instances, prompts, rows, strict=True)]

    def _after_prompt(self, instance: Instance, prompt: Ids, ids: Ids) -> Ids:
        if ids[: len(prompt)] != prompt:
            raise ValueError(
                f"{instance.where}: the chat template of tokenizer {self._tokenizer.name_or_path!r} does not begin the "
                f"assistant message {instance.output[:40]!r} with the tokens of its generation prompt; strip white "
                "space around the output, set tokenizer.chat_template to one that does, or use template='plain'"
            )
        return ids[len(prompt) :]

    def _render(self, conversations: list[list[dict[str, str]]], add_generation_prompt: bool = False) -> list[str]:
        texts: Any = self._tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return texts

    @staticmethod
    def messages(instruction: str, context: str, demonstrations: Sequence[Demonstration]) -> list[dict[str, str]]:
        """The turns of a conversation that ends with the question."""

        def ask(context: str) -> dict[str, str]:
            return _message("user", f"{instruction}\n\n{context}" if context else instruction)

        worked = [turn for d in demonstrations for turn in (ask(d.context), _message("assistant", d.output))]
        return [*worked, ask(context)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase", closing: str) -> tuple[str, int | None]:
    """The text of ``closing``, which follows an answer, before its end-of-turn token; and that token's id."""
    found = [
        (closing.index(token.content), -len(token.content), token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and token.content in closing
    ]
    if not found:
        return "", _end_of_sequence_id(tokenizer)
    start, _, token_id = min(found)
    return closing[:start], token_id


def _end_of_sequence_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    token_id: Any = tokenizer.eos_token_id
    return token_id


def _tokenize(tokenizer: "PreTrainedTokenizerBase", texts: list[str], add_special_tokens: bool = False) -> list[Ids]:
    batch: Any = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        # No warning for long sequences: validation checks lengths and names the rows.
        verbose=False,
    )
    return batch["input_ids"]
