"""H2O: keep the tokens with the most attention so far, the heavy hitters, and the newest ones.

Each token carries the sum of the softmax weights that all queries since its arrival gave it, per KV
head (summed over the query heads that share it). Half the budget goes to heavy hitters, half to the
newest tokens.
Paper: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
https://arxiv.org/abs/2306.14048.

Differs from the paper: the sum is streamed chunk by chunk, so a key has only met the queries that
ran while it was cached. ``per_query=true`` divides by the number of those queries, which is a
different method that does not favour old tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy


@dataclass(kw_only=True)
class H2O(Policy):
    """heavy_ratio: share of the budget for heavy hitters; the rest goes to the newest tokens."""

    columns: ClassVar[tuple[str, ...]] = ("attention_mass",)

    heavy_ratio: float = 0.5
    per_query: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.heavy_ratio <= 1:
            raise ValueError(f"heavy_ratio must be over 0 and at most 1, got {self.heavy_ratio}")

    @property
    def needs(self) -> Needs:
        return Needs(attention_mass=True)

    def num_recent(self, budget_tokens: int) -> int:
        return max(self.recent, budget_tokens - round(self.heavy_ratio * budget_tokens))

    def score(self, view: LayerView) -> Tensor:
        assert view.attention_mass is not None, "the engine hands over what needs asks for"
        mass = view.columns["attention_mass"].add_(view.attention_mass)
        if not self.per_query:
            return mass
        newest = view.positions.amax(dim=-1, keepdim=True)
        return mass / (newest - view.positions + 1)
