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


# Cosines and sines [S, Q, D] without the embedding's own scale, and that scale [S, 1, 1].
_Angles = tuple[Tensor, Tensor, Tensor]


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
        self._angles: dict[str | None, _Angles] = {}
        self._next_angles: dict[tuple[str | None, int], tuple[Tensor, Tensor]] = {}
        # Of the steps from a position to the next ones, the same wherever a text stands.
        self._mean_steps: dict[tuple[str | None, int], tuple[Tensor, Tensor]] = {}

    def rotate(self, attention: nn.Module, keys: Tensor, shift: Tensor) -> Tensor:
        """Keys [S, K, T, D] of one layer moved ``shift`` positions onwards ([S], integers)."""
        if not getattr(attention, "use_rope", True):
            return keys  # a layer without positional encoding (SmolLM3)
        # The stored key carries the embedding's own scale (YaRN) already.
        cos, sin, _ = self._angles_of(attention, keys, shift)
        return _turned(attention, keys, cos, sin)

    def unrotate(self, attention: nn.Module, heads: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys [S, heads, Q, D] at ``positions`` ([S, Q]) as they were projected."""
        if not getattr(attention, "use_rope", True):
            return heads
        cos, sin, scale = self._angles_of(attention, heads, positions)
        return _turned(attention, heads, cos / scale, -sin / scale)

    def turn_to_next(
        self, attention: nn.Module, heads: Tensor, positions: Tensor, num_next: int
    ) -> Tensor:
        """Queries [S, heads, X, D] as projected, as they are on average over the next positions.

        Those are the ``num_next`` positions after the last of ``positions`` [S, Q]. What a rotation
        does is linear in its cosines and sines, so their means give the mean of the results.
        """
        if not getattr(attention, "use_rope", True):
            return heads
        cos, sin = self._next_angles_of(attention, heads, positions, num_next)
        return _turned(attention, heads, cos, sin)

    def _next_angles_of(
        self, attention: nn.Module, like: Tensor, positions: Tensor, num_next: int
    ) -> tuple[Tensor, Tensor]:
        """Mean cosines and sines [S, 1, D] of the next positions, with the embedding's own scale.

        They are put together from the angles at the last position and those of the steps from it,
        for an embedding may change its frequencies if it is shown positions beyond its context.
        """
        cos, sin, scale = self._angles_of(attention, like, positions)
        key = (self._layer_type(attention), num_next)
        if key not in self._mean_steps:
            steps = torch.arange(1, num_next + 1, device=positions.device)[None]
            step_cos, step_sin, _ = self._compute_angles(attention, like, steps)
            self._mean_steps[key] = step_cos.mean(dim=1), step_sin.mean(dim=1)  # [1, D]
        if key not in self._next_angles:
            step_cos, step_sin = self._mean_steps[key]
            cos, sin = cos[:, -1:] * scale, sin[:, -1:] * scale
            self._next_angles[key] = (
                cos * step_cos - sin * step_sin,
                sin * step_cos + cos * step_sin,
            )
        return self._next_angles[key]

    def _angles_of(self, attention: nn.Module, like: Tensor, positions: Tensor) -> _Angles:
        """At ``positions`` ([S, Q], or [S] for all tokens)."""
        if self._positions is not positions:
            self._positions, self._angles, self._next_angles = positions, {}, {}
        layer_type = self._layer_type(attention)
        if layer_type not in self._angles:
            rows = positions if positions.dim() == 2 else positions[:, None]
            self._angles[layer_type] = self._compute_angles(attention, like, rows)
        return self._angles[layer_type]

    def _compute_angles(self, attention: nn.Module, like: Tensor, positions: Tensor) -> _Angles:
        # Position 0 goes along, for its cosine is the embedding's own scale.
        position_ids = torch.cat([positions, torch.zeros_like(positions[:, :1])], dim=-1)
        layer_type = self._layer_type(attention)
        cos, sin = self._rotary(
            at_least_float32(like), position_ids, *([layer_type] if layer_type else [])
        )
        scale = cos[:, -1:].amax(dim=-1, keepdim=True)
        return cos[:, :-1] / scale, sin[:, :-1] / scale, scale

    def _layer_type(self, attention: nn.Module) -> str | None:
        return str(attention.layer_type) if self._by_layer_type else None


def _turned(attention: nn.Module, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[S, heads, Q, D] by the model's own rotation, with cosines and sines [S, Q or 1, D]."""
    precise = at_least_float32(heads)
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    turned, _ = apply(precise, precise, cos, sin)
    return turned.to(heads.dtype)
