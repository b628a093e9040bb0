"""Numbers and bytes of a token in a model's KV cache, worked out from its configuration."""

from transformers import PreTrainedConfig

POSITION_BYTES = 4  # stored beside every token of every KV head
_FP16_BYTES = 2


def values_per_token(config: PreTrainedConfig) -> int:
    """Numbers in the keys and values of one token, all KV heads of all layers."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * _num_kv_heads(config) * head_dim


def bytes_per_token(config: PreTrainedConfig, item_bytes: int) -> int:
    """Keys, values and position of one token in all KV heads of all layers."""
    positions = POSITION_BYTES * _num_kv_heads(config.get_text_config())
    return values_per_token(config) * item_bytes + positions


def compression(
    config: PreTrainedConfig, *, kv_bytes: int, kept_tokens: int, prompt_tokens: int
) -> dict[str, float]:
    """bits_per_value of the kept tokens, and compression_ratio against fp16 of the whole prompt."""
    values = values_per_token(config)
    return {
        "bits_per_value": 8 * kv_bytes / (values * kept_tokens),
        "compression_ratio": _FP16_BYTES * values * prompt_tokens / kv_bytes,
    }


def _num_kv_heads(config: PreTrainedConfig) -> int:
    """Over all layers."""
    per_layer = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers * per_layer
