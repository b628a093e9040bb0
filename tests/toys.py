"""Tiny random models of many architectures, and prompts for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from kvarena.harness.engine import Batch, Generation, Request

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
# name -> (transformers' model type, what differs)
ARCHITECTURES = {
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
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (num_tokens,), generator=generator).tolist()


def save_random_heads(
    path: Path,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    num_layers: int = 6,
) -> Path:
    """Untrained retaining heads in the format of trained ones; the defaults fit every toy model."""
    generator = torch.Generator().manual_seed(0)
    heads = {}
    for layer in range(num_layers):
        num_features, num_hidden = (num_heads + 2 * num_kv_heads) * head_dim, 8
        heads[f"layers.{layer}.w1"] = torch.randn(num_features, num_hidden, generator=generator)
        heads[f"layers.{layer}.w2"] = torch.randn(num_hidden, num_kv_heads, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(heads, path)
    return path


def requests(prompts: Sequence[Sequence[int]], **lists: Sequence[Any]) -> list[Request]:
    """One request per prompt; every option is a list with an entry for each."""
    return [
        Request(prompt=prompt, **{name: values[i] for name, values in lists.items()})
        for i, prompt in enumerate(prompts)
    ]


def finished(batch: Batch) -> list[Generation]:
    """All generations of a batch, by index; what it held last is still in its layers."""
    found: list[Generation] = []
    while batch.has_work:
        found += batch.step()
    return sorted(found, key=lambda generation: generation.index)
