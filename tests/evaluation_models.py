"""Small models and a byte tokenizer for the evaluation tests."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

POSITIONS = 256
_SMALL = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, then ``<s>`` and ``</s>``; without padding token unless ``special`` names one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"bos_token": "<s>", "eos_token": "</s>", **special})


def small_model(family: str = "llama", **changes: object) -> PreTrainedModel:
    """A random float32 model over the bytes, the same every time."""
    torch.manual_seed(0)
    names = {"gpt2": {"n_inner": 64}, "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64}}.get(family, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**_SMALL, **names, **changes}))
    # Larger weights than at the usual start make the next token depend on the whole prompt.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    return model.eval()


def teach(model: PreTrainedModel, examples: list[tuple[list[int], list[int]]], steps: int = 60) -> None:
    """Overfit ``model`` on pairs of prompt and response ids."""
    rows = [(prompt + response, [-100] * len(prompt) + response) for prompt, response in examples]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
