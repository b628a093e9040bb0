"""Full cache: nothing is ever evicted, whatever the budget; all policies are held against it.

Method: dense attention over every token. Paper: "Attention Is All You Need",
https://arxiv.org/abs/1706.03762.

Differs from the paper: nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvarena.policies.base import LayerView, Policy


@dataclass(kw_only=True)
class Full(Policy):
    """Keeps everything, so ``sinks`` and ``recent`` change nothing."""

    evicts: ClassVar[bool] = False

    def score(self, view: LayerView) -> Tensor:
        return view.positions.float()
