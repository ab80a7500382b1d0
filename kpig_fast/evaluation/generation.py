"""Greedy answers of a causal language model to many prompts, in batches."""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kpig_fast.processes import gather, is_sharded, rank, world
from kpig_fast.tree.model import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of the tokens of the prompts, at most these are computed where a further call is made.
_WORTH_SHARING = 0.75


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

    What prompts of a batch begin with alike is computed once, where the model's cache can be shared. Several processes,
    each called with the same prompts, share the work and all get the answers. The model's training flags and generation
    settings are as before afterwards.

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
    share = _can_share(model)
    with (
        _prepared(model, greedy),
        tqdm(total=sum(map(len, batches)), desc="answering", unit="answer", disable=not progress) as bar,
    ):
        for batch in batches:
            ids = _continue(model, [prompts[i] for i in batch], pad, share)
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


@dataclass(frozen=True)
class _Layout:
    """How the prompts of a batch share what they begin with.

    Args:
        rest: how many tokens at the end of every prompt are computed for it alone; those before are a beginning of
            one of ``beginnings``.
        beginnings: what is computed once, sorted; none begins another.
    """

    rest: int
    beginnings: list[list[int]]

    def tokens(self, n: int) -> int:
        """Tokens computed for ``n`` prompts, padding included."""
        return len(self.beginnings) * max(map(len, self.beginnings), default=0) + n * self.rest


def _layout(prompts: Sequence[Sequence[int]]) -> _Layout | None:
    """The layout that computes the fewest tokens; None where sharing spares too little to be worth a further call."""
    ordered = sorted(map(list, prompts))
    shared = [_n_alike(*pair) for pair in pairwise(ordered)]
    # Only here does the number of beginnings change; generation needs one token to go on from.
    rests = {max(1, len(ids) - max(pair)) for ids, *pair in zip(ordered, [0, *shared], [*shared, 0], strict=True)}
    layouts = [_Layout(rest, _beginnings(ordered, rest)) for rest in rests]
    best = min(layouts, key=lambda layout: layout.tokens(len(prompts)))
    return best if best.tokens(len(prompts)) < _WORTH_SHARING * sum(map(len, prompts)) else None


def _n_alike(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))


def _beginnings(prompts: Sequence[list[int]], rest: int) -> list[list[int]]:
    """What is left of ``prompts`` without their last ``rest`` tokens, sorted, without what begins another."""
    ordered = sorted(ids[:-rest] for ids in prompts if len(ids) > rest)
    following = [*ordered, []][1:]
    return [ids for ids, after in zip(ordered, following, strict=True) if after[: len(ids)] != ids]


def _can_share(model: Any) -> bool:
    """Whether all that the model keeps of earlier tokens are their keys and values."""
    peft = getattr(model, "active_peft_config", None)
    # The processes of a model in pieces must all make the same calls, and a cache has no place for virtual tokens.
    if is_sharded(model) or (peft is not None and peft.is_prompt_learning):
        return False
    lm = model if peft is None else model.get_base_model()
    if lm._is_stateful or "past_key_values" not in signature(lm.forward).parameters:
        return False
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _continue(model: Any, prompts: list[Sequence[int]], pad: int, share: bool) -> list[list[int]]:
    """The new token ids after every prompt, up to max_new_tokens each; the longest prompt comes first."""
    width = len(prompts[0])
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    layout = _layout(prompts) if share else None
    out = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        past_key_values=layout and _cache(model, prompts, layout, pad),
        synced_gpus=is_sharded(model),
    )
    return out[:, width:].tolist()


def _cache(model: Any, prompts: list[Sequence[int]], layout: _Layout, pad: int) -> DynamicCache:
    """Keys and values of every prompt but for its last ``layout.rest`` tokens, padded on the left."""
    length = max(map(len, layout.beginnings))
    # Padding on the right changes nothing before it.
    ids = torch.tensor([[*b, *[pad] * (length - len(b))] for b in layout.beginnings], device=model.device)
    once = DynamicCache()
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=once, max_new_tokens=1)
    known = [list(prompt[: -layout.rest]) for prompt in prompts]
    # The first beginning that is not before these tokens in the order starts with them.
    which = torch.tensor([[bisect_left(layout.beginnings, k)] for k in known], device=model.device)
    before = torch.tensor([[length - len(k)] for k in known], device=model.device)
    where = (torch.arange(length, device=model.device) - before).clamp(min=0)

    layers: list[Any] = once.layers
    kept = [[x.transpose(1, 2)[which, where].transpose(1, 2) for x in (layer.keys, layer.values)] for layer in layers]
    return DynamicCache([(keys, values) for keys, values in kept])


def _texts(tokenizer: "PreTrainedTokenizerBase", answers: list[list[int]], ends: set[int]) -> list[str]:
    before_end = [list(takewhile(lambda token: token not in ends, answer)) for answer in answers]
    texts = tokenizer.batch_decode(before_end, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]
