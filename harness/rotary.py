"""Moving keys to other positions with the model's own rotary embedding.

A rotary embedding only ever encodes differences of positions, so a key stored for position p is
rotated by a further s positions to act as one at p + s. Paper: "RoFormer", section 3.4.2,
https://arxiv.org/abs/2104.09864.
"""

import inspect
import sys

import torch
from torch import Tensor, nn

from kvarena.harness.errors import UsageError
from kvarena.policies.base import at_least_float32

# Models that leave rotary positions out of their full-attention layers without an attribute on the
# layer that says so (as SmolLM3's use_rope does).
_UNMARKED_NO_ROPE = ("cohere2", "exaone4")


class KeyRotator:
    """Rotates the keys of any layer of one model."""

    def __init__(self, model: nn.Module) -> None:
        """Raise UsageError if the model has no rotary embedding to use."""
        base = getattr(model, "base_model", model)
        rotary = getattr(base, "rotary_emb", None)
        if rotary is None:
            raise UsageError(
                f"{type(model).__name__} has no rotary embedding, so positions cannot be ranks; "
                "use policy.reindex=false"
            )
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in _UNMARKED_NO_ROPE:
            raise UsageError(
                f"some layers of {model_type} have no positions and do not say which, so positions "
                "cannot be ranks; use policy.reindex=false"
            )
        self._rotary: nn.Module = rotary
        parameters = inspect.signature(rotary.forward).parameters
        self._by_layer_type = "layer_type" in parameters

    def rotate(self, attention: nn.Module, keys: Tensor, shift: Tensor) -> Tensor:
        """Keys [S, K, T, D] of one layer moved ``shift`` positions onwards ([S], integers)."""
        if not getattr(attention, "use_rope", True):
            return keys  # a layer without positional encoding (SmolLM3)
        # Two positions per sequence: the shift, and 0, whose cosine is the embedding's own scale
        # (YaRN). The stored key has that scale already, so it is divided out.
        position_ids = torch.stack([shift, torch.zeros_like(shift)], dim=-1)
        layer_type = [attention.layer_type] if self._by_layer_type else []
        precise = at_least_float32(keys)
        cos, sin = self._rotary(precise, position_ids, *layer_type)
        scale = cos[:, 1:].amax(dim=-1, keepdim=True)
        apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        rotated, _ = apply(precise, precise, cos[:, :1] / scale, sin[:, :1] / scale)
        return rotated.to(keys.dtype)
