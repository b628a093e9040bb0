"""Tiny random models of many architectures, and prompts for them."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 128
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # sharp attention, so that a wrong mask shows
}
# name -> (transformers' model type, what differs); Any: configurations hold what they like
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 48}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            # Low caps, so that leaving them out would show.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            # Sharper weights make the router's choice of experts magnify rounding.
            "initializer_range": 0.1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def toy_model(
    architecture: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """The same random weights every time."""
    model_type, differs = ARCHITECTURES[architecture]
    config = CONFIG_MAPPING[model_type](**{**_SMALL, **differs, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None  # random text must not end by chance
    return model.eval()


def kernel_for(architecture: str) -> str:
    """sdpa wherever it can express the architecture."""
    return "reference" if architecture in ("gemma2", "gpt_oss") else "sdpa"


def toy_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids, the same for the same seed, none of them a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (num_tokens,), generator=generator).tolist()
