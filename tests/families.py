"""Small random models of every family that must run on a token tree, and of those that must not; sequences for them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kpig_fast.ops import response_logprob
from kpig_fast.tree.layout import build
from kpig_fast.tree.model import OutputHead, run_tree

VOCABULARY = 97
WINDOW = 5

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW = {"sliding_window": WINDOW}
_WINDOWED = {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0, "dropout": 0.0}
_NO_DROPOUT |= {"hidden_dropout": 0.0, "activation_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}

SUPPORTED: dict[str, dict] = {
    "llama": {},
    "mistral": _WINDOW,
    "qwen2": _WINDOWED,
    "qwen3": {},
    "gemma": {},
    "gemma2": {**_WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_WINDOW, **_LAYERS, "query_pre_attn_scalar": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": _WINDOW,
    "olmo": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "smollm3": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**_WINDOW, **_LAYERS, "logit_scale": 0.5},
    "starcoder2": _WINDOW,
    "mixtral": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, **_WINDOWED, "shared_expert_intermediate_size": 24},
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {**_EXPERTS, **_WINDOW, **_LAYERS},
    "glm": {},
    "glm4": {},
    "helium": {},
    "exaone4": {**_WINDOW, **_LAYERS},
    "ernie4_5": {},
    "apertus": {},
}

# Attention code of their own, ALiBi, other token mixers, or keyword arguments that get lost.
UNSUPPORTED: dict[str, dict] = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "mamba": {"state_size": 4},
    "qwen3_next": {
        **_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 24,
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    "stablelm": {},
    "nemotron": {},
}


def make_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A small random model whose weights are large enough that a wrong mask changes its logits plainly."""
    options = {**_COMMON, **_NO_DROPOUT, **SUPPORTED.get(family, {}), **UNSUPPORTED.get(family, {}), **overrides}
    config = AutoConfig.for_model(family, **options)
    # The default experts are a matrix product that knows no float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **experts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Drawn in float32 for every dtype, so that models of one seed are one model.
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(parameter.mean().round() + 0.2 * noise)
    return model.eval()


@dataclass(frozen=True)
class Branches:
    """Sequences of prompt and response: two instructions that share their start, each with several instances."""

    sequences: list[list[int]]
    starts: list[int]

    @property
    def target(self) -> Tensor:
        """Response tokens of all sequences, one after another [N]."""
        pairs = zip(self.sequences, self.starts)
        return torch.tensor([token for sequence, start in pairs for token in sequence[start:]])

    @property
    def weight(self) -> Tensor:
        """A different factor in the loss for each response token [N], both signs, float64."""
        return torch.linspace(-1, 2, len(self.target), dtype=torch.float64)


def make_branches(vocabulary: int = VOCABULARY, seed: int = 0) -> Branches:
    """Complete and masked prompts of four instances, all longer than the window; one response is one token long."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        # Above the special tokens: the embedding of padding never gets a gradient.
        return torch.randint(3, vocabulary, (n,), generator=generator).tolist()

    start, complete, masked = ids(4), ids(5), ids(2)
    sequences, starts = [], []
    for context_length, response_length in ((3, 1), (3, 7), (0, 4), (6, 3)):
        context, response = ids(context_length), ids(response_length)
        for prompt in (start + complete + context, start + masked + context):
            sequences.append(prompt + response)
            starts.append(len(prompt))
    return Branches(sequences, starts)


def loss_of(log_probs: Tensor, branches: Branches) -> Tensor:
    """The weighted sum of the responses' log-probs."""
    return (log_probs * branches.weight.to(log_probs)).sum()


def run_apart(model: nn.Module, branches: Branches) -> Tensor:
    """[N] log p of the response tokens: each sequence alone through the model's own forward and attention."""
    logits = [
        model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, start - 1 : -1]
        for sequence, start in zip(branches.sequences, branches.starts)
    ]
    return torch.cat(logits).log_softmax(-1).gather(1, branches.target[:, None])[:, 0]


def run_together(model: nn.Module, branches: Branches) -> Tensor:
    """[N] the same on one token tree; inside ``tree_mode`` only."""
    tree = build(branches.sequences, branches.starts)
    place = {sequence: i for i, sequence in enumerate(tree.sequences.tolist())}
    rows = torch.cat([tree.rows_of(place[i]) for i in range(len(branches.sequences))])
    target = branches.target

    def compute(hidden: Tensor, head: OutputHead) -> Tensor:
        return response_logprob(hidden[rows], head.weight, target, bias=head.bias, **head.transform)

    return run_tree(model, tree, compute)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter that has one, in float64; the model's are cleared."""
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def worst_gradient_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest norm of an error relative to the norm of its parameter's gradient.

    A gradient that is zero but for rounding (the bias of keys, which shifts all scores alike) is measured against the
    norm of all gradients instead.
    """
    assert set(found) == set(exact)
    total = float(torch.stack([g.norm() for g in exact.values()]).norm())
    sizes = {name: size if (size := float(g.norm())) > 1e-9 * total else total for name, g in exact.items()}
    return max(float((found[name] - g).norm()) / sizes[name] for name, g in exact.items())
