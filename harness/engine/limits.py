"""What cannot be run, said before any work: kernels, architectures and contexts."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvarena.harness.engine.attention import KERNELS
from kvarena.harness.engine.eviction import Eviction
from kvarena.harness.engine.flash_source import flash_attn_func
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import one_of
from kvarena.shapes.uniform import Uniform


def check_attention(attention: str, device: str, dtype: torch.dtype) -> None:
    """Raise UsageError for a kernel that is unknown or cannot run here."""
    one_of("attention", attention, list(KERNELS))
    if attention != "flash":
        return
    if not device.startswith("cuda") or dtype == torch.float32:
        raise UsageError("attention=flash runs on cuda in bfloat16 or float16; use attention=sdpa")
    flash_attn_func()  # fetched now, if it must be


def check_graphs(device: str, eviction: Eviction, *, codes: bool) -> None:
    """Raise UsageError where decoding steps cannot be CUDA graphs. codes: whether a codec does."""
    is_steady = isinstance(eviction.shape, Uniform) and eviction.every == 1
    looks_ahead = bool(eviction.policy.needs.token_scores)  # in numbers that a graph would repeat
    if not device.startswith("cuda") or codes or looks_ahead or not is_steady:
        raise UsageError(
            "graphs=true needs a CUDA device, codec=none, shape=uniform, evict_every=1 and a "
            "policy that does not look ahead; leave it out"
        )


def check_architecture(model: PreTrainedModel) -> None:
    """Raise UsageError for a model whose layers do not only attend to keys and values."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown_kinds = sorted(kinds - {"full_attention", "sliding_attention"})
    if getattr(model, "_is_stateful", False) or unknown_kinds:
        kind = ", ".join(unknown_kinds) or "recurrent"
        raise UsageError(
            f"model type {config.model_type} is not supported: no token budget bounds its {kind} "
            "layers; use a model with full or sliding-window attention only"
        )


def context_tokens(config: PreTrainedConfig) -> int | None:
    """Most tokens of prompt and answer that the model handles; None if it states no limit.

    Beyond the original context, rotary embeddings of type dynamic and longrope change with the
    longest sequence of a pass, so that neighbours would disturb each other: that is the limit.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        return original or limit
    return limit


def check_context(
    name: str,
    prompt_tokens: int,
    max_new_tokens: int,
    limit_tokens: int | None,
    advice: str = "use shorter prompts or fewer new tokens",
) -> None:
    """Raise UsageError, with the advice, if prompt and answer do not fit the model's context."""
    needed = prompt_tokens + max_new_tokens
    if limit_tokens is not None and needed > limit_tokens:
        raise UsageError(
            f"{name} has {prompt_tokens} tokens, with {max_new_tokens} new ones {needed}: over the "
            f"model's context of {limit_tokens}; {advice}"
        )
