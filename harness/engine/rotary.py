"""Moving queries and keys to other positions with the model's own rotary embedding.

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
                f"{type(model).__name__} has no rotary embedding, so no policy that needs one "
                "can be used with it (streaming_llm: policy.reindex=false needs none)"
            )
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in _UNMARKED_NO_ROPE:
            raise UsageError(
                f"some layers of {model_type} have no rotary positions and do not say which, so no "
                "policy that moves keys can be used with it (streaming_llm: policy.reindex=false)"
            )
        self._rotary: nn.Module = rotary
        parameters = inspect.signature(rotary.forward).parameters
        self._by_layer_type = "layer_type" in parameters
        # The last positions asked for, and their angles by layer type: all layers of a pass share
        # one tensor of positions, so the angles are worked out once per pass and not per layer.
        self._positions: Tensor | None = None
        self._angles: dict[str | None, tuple[Tensor, Tensor, Tensor]] = {}

    def rotate(self, attention: nn.Module, keys: Tensor, shift: Tensor) -> Tensor:
        """Keys [S, K, T, D] of one layer moved ``shift`` positions onwards ([S], integers)."""
        if not getattr(attention, "use_rope", True):
            return keys  # a layer without positional encoding (SmolLM3)
        # The stored key carries the embedding's own scale (YaRN) already.
        return self._apply(attention, keys, shift, backwards=False)

    def unrotate(self, attention: nn.Module, heads: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys [S, heads, Q, D] at ``positions`` ([S, Q]) as they were projected."""
        if not getattr(attention, "use_rope", True):
            return heads
        return self._apply(attention, heads, positions, backwards=True)

    def _apply(
        self, attention: nn.Module, heads: Tensor, positions: Tensor, *, backwards: bool
    ) -> Tensor:
        """[S, heads, Q, D] turned by ``positions`` ([S, Q], or [S] for all); backwards unscales."""
        precise = at_least_float32(heads)
        cos, sin, scale = self._angles_of(attention, precise, positions)
        if backwards:
            cos, sin = cos / scale, -sin / scale
        apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        turned, _ = apply(precise, precise, cos, sin)
        return turned.to(heads.dtype)

    def _angles_of(
        self, attention: nn.Module, like: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and sines [S, Q, D] without the embedding's own scale, and that scale."""
        if self._positions is not positions:
            self._positions, self._angles = positions, {}
        layer_type = str(attention.layer_type) if self._by_layer_type else None
        if layer_type not in self._angles:
            rows = positions if positions.dim() == 2 else positions[:, None]
            # Position 0 goes along, for its cosine is the embedding's own scale.
            position_ids = torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=-1)
            cos, sin = self._rotary(like, position_ids, *([layer_type] if layer_type else []))
            scale = cos[:, -1:].amax(dim=-1, keepdim=True)
            self._angles[layer_type] = cos[:, :-1] / scale, sin[:, :-1] / scale, scale
        return self._angles[layer_type]
