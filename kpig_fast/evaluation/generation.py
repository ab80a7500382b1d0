"""Greedy answers of a causal language model to many prompts, in batches."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from kpig_fast.processes import gather, is_sharded, rank, world
from kpig_fast.tree.model import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int = 8192,
    end_ids: Collection[int] = (),
    names: Sequence[str] | None = None,
    stop_at_newline: bool = False,
    progress: bool = False,
) -> list[str]:
    """Answer every prompt greedily; the answers come in the order of the prompts.

    Several processes, each called with the same prompts, share the work and all get the answers. The model's training
    flags and generation settings are as before afterwards.

    Args:
        model: a Hugging Face causal language model, or one under PEFT.
        tokenizer: its tokenizer.
        prompts: token ids of every prompt.
        max_new_tokens: longest answer, in tokens.
        batch_tokens: the most tokens (padding and answers included) that a batch holds; one prompt always fits.
        end_ids: tokens that end an answer, besides the end-of-sequence tokens of the tokenizer and of the model.
        names: how errors name the prompts; by their numbers otherwise.
        stop_at_newline: cut every answer at its first new line.
        progress: show a progress bar.

    Returns:
        The text of every answer up to its end token, without special tokens and outer white space.

    Raises:
        ValueError: an empty prompt, one that leaves no room for the answer, or ``max_new_tokens`` below 1.
    """
    names = names or [f"prompt {index}" for index in range(len(prompts))]
    check_prompts(model, prompts, names, max_new_tokens)
    ends = _end_ids(model, tokenizer) | set(end_ids)
    # Padding is masked and cut off again, so that any token will do.
    pad = next(i for i in (tokenizer.pad_token_id, *sorted(ends), 0) if isinstance(i, int))
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
    )
    batches = _share_of_batches(list(_batches(prompts, max_new_tokens, batch_tokens)))
    answers: dict[int, str] = {}
    with (
        _prepared(model, greedy),
        tqdm(total=sum(map(len, batches)), desc="answering", unit="answer", disable=not progress) as bar,
    ):
        for batch in batches:
            ids = _continue(model, [prompts[i] for i in batch], pad)
            for index, text in zip(batch, _texts(tokenizer, ids, ends), strict=True):
                answers[index] = text.split("\n", 1)[0].rstrip() if stop_at_newline else text
            bar.update(len(batch))
    everyones = dict(gather(list(answers.items())))
    return [everyones[i] for i in range(len(prompts))]


def check_prompts(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], names: Sequence[str], max_new_tokens: int
) -> None:
    """Check that every prompt can be answered; ValueError, as of ``generate_answers``, names the first that cannot."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; an answer needs at least 1")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, prompt in zip(names, prompts, strict=True):
        if not len(prompt):
            raise ValueError(f"{name} is empty; give at least one token")
        if positions is not None and len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"{name} has {len(prompt)} prompt tokens; the model's {positions} positions leave room for "
                f"{positions - max_new_tokens} beside {max_new_tokens} new ones: shorten it or lower max_new_tokens"
            )


def _end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    of_model = model.generation_config.eos_token_id if model.generation_config else None
    ids = of_model if isinstance(of_model, list) else [of_model]
    return {i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int)}


def _batches(prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length, longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        width = len(prompts[order[0]]) + max_new_tokens
        count = max(1, batch_tokens // width)
        yield order[:count]
        order = order[count:]


def _share_of_batches(batches: list[list[int]]) -> list[list[int]]:
    """What this process answers: as many batches as every other, because a model in pieces is called together."""
    rounds = range(rank(), len(batches) + -len(batches) % world(), world())
    return [batches[min(i, len(batches) - 1)] for i in rounds]


@contextmanager
def _prepared(model: "PreTrainedModel", greedy: GenerationConfig) -> Iterator[None]:
    """Evaluation mode and ``greedy`` settings for all of the model, each module's own ones again afterwards."""
    # The model's settings would fill what ``greedy`` leaves open, such as a repetition penalty.
    settings = [
        (module, vars(module)["generation_config"]) for module in model.modules() if "generation_config" in vars(module)
    ]
    for module, _ in settings:
        vars(module)["generation_config"] = greedy
    try:
        with evaluation_mode(model):
            yield
    finally:
        for module, before in settings:
            vars(module)["generation_config"] = before


def _continue(model: Any, prompts: list[Sequence[int]], pad: int) -> list[list[int]]:
    """The new token ids after every prompt, up to max_new_tokens each; the longest prompt comes first."""
    width = len(prompts[0])
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    out = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        synced_gpus=is_sharded(model),
    )
    return out[:, width:].tolist()


def _texts(tokenizer: "PreTrainedTokenizerBase", answers: list[list[int]], ends: set[int]) -> list[str]:
    before_end = [list(takewhile(lambda token: token not in ends, answer)) for answer in answers]
    texts = tokenizer.batch_decode(before_end, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]
