"""Pyramid: lower layers keep more tokens than upper ones, all heads of a layer as many.

What is left of N once the protected tokens are served, F, falls in a straight line from the first
layer's 2 F - F / beta to the last layer's F / beta, so that its mean is F.
Paper: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
https://arxiv.org/abs/2406.02069, section 4.1; beta 20 as in its released code.

Differs from the paper: its window of the last queries is here whatever the policy or the setting
``protect`` keeps in any case; and the shape goes with every score, not with SnapKV's alone.
"""

from dataclasses import dataclass

from kvarena.shapes.base import Shape


@dataclass(kw_only=True)
class Pyramid(Shape):
    """beta: the last layer's share is a beta-th of the mean; 1 is even."""

    beta: float = 20.0

    def __post_init__(self) -> None:
        if not isinstance(self.beta, int | float) or not self.beta >= 1:
            raise ValueError(f"beta must be a number of at least 1, got {self.beta!r}")

    def layer_tokens(
        self, budget_tokens: int, protected_tokens: int, layer: int, num_layers: int
    ) -> int:
        free = budget_tokens - protected_tokens
        smallest = free / self.beta
        largest = 2 * free - smallest
        step = (largest - smallest) / max(1, num_layers - 1)

        def up_to(layers: int) -> int:
            """All that the first so many layers get; rounded, so that all of them get L * F."""
            if num_layers == 1:
                return free * layers
            return round(layers * largest - step * layers * (layers - 1) / 2)

        return protected_tokens + up_to(layer + 1) - up_to(layer)
