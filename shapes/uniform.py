"""Uniform: every head of every layer keeps as many tokens.

What most papers of eviction policies assume, KeyDiff's among them
(https://arxiv.org/abs/2504.15364).

Differs from the paper: nothing.
"""

from dataclasses import dataclass

from kvarena.shapes.base import Shape


@dataclass(kw_only=True)
class Uniform(Shape):
    """No options."""
