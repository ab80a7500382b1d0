"""Small random models of every family that must run on a token tree, and of those that must not."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0, "dropout": 0.0}
_NO_DROPOUT |= {"hidden_dropout": 0.0, "activation_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}

SUPPORTED: dict[str, dict] = {
    "llama": {},
    "mistral": _WINDOW,
    "qwen2": {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
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
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 24},
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
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()
