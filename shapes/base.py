"""What a budget shape is: a rule that shares one budget out among layers and heads.

A budget of N tokens means L * K * N places in all; a shape says how many of them each layer and
each KV head gets. The policy says which tokens fill them.
To add one: a file here with a ``Shape`` subclass, and ``conf/shape/<file name>.yaml``.

Shape letters: L layers, K KV heads, T tokens that a head holds, N budget tokens per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(kw_only=True)
class Shape:
    """Base of all shapes, itself the even one; options are dataclass fields.

    scope: the heads whose scores are weighed against each other. "head": none, every head of a
    layer gets the same. "layer": those of one layer. "model": all of all layers, after the pass.
    """

    scope: ClassVar[Literal["head", "layer", "model"]] = "head"

    def layer_tokens(
        self, budget_tokens: int, protected_tokens: int, layer: int, num_layers: int
    ) -> int:
        """Tokens per head of one layer, on average over its heads; over all layers their mean is N.

        budget_tokens: N; protected_tokens: how many of them the protection takes in any case.
        """
        return budget_tokens

    def head_tokens(self, scores: Sequence[Tensor], budget_tokens: int) -> list[int]:
        """How many tokens each head keeps, at most as many as it has; their mean is N.

        scores: of each head in scope, [T] float32 with protected tokens at +inf.
        Called only for a scope wider than a head, when the heads hold more than N on average.
        """
        return [budget_tokens] * len(scores)
