"""Vectors of texts: the mean of a model's last hidden states over the tokens."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kpig_fast.tree.model import evaluation_mode


@cache
def load_embedder(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sentence embedder whose vectors are means of hidden states, and its tokenizer, from a folder or hub name."""
    return AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def embed(texts: Sequence[str], model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.float32]:
    """A vector for each text [n, d]; of a causal language model, the hidden states before its head are taken.

    Args:
        texts: what to embed, none empty.
        model: a sentence embedder or causal language model of transformers; left as it was.
        tokenizer: its tokenizer.
    """
    device = next(model.parameters()).device
    # One by one: a language model need not have a token to pad with.
    inputs = [tokenizer(text, return_tensors="pt").to(device) for text in texts]
    with evaluation_mode(model):
        # A call of what lies inside the model would find no weights under FSDP, nor an adapter.
        hidden = [model(input_ids=x["input_ids"], output_hidden_states=True).hidden_states[-1][0] for x in inputs]
    return torch.stack([rows.float().mean(0) for rows in hidden]).cpu().numpy()
