"""Oracle: keep what the full cache's own answer will look at. A reference, not a method.

A token's score is the attention that all tokens of the answer give it, added up over the query
heads that share its KV head. The full cache answers first (or is forced to the answer that will be
fed), in memory that nothing bounds; then the same request runs under the budget. No score that
knows the past alone can be expected to do better, so the distance to it is a policy's regret.
The idea is that of H2O's heavy hitters (https://arxiv.org/abs/2306.14048) with the sum taken over
the queries to come.

Differs from the paper: nothing of it is a method there. A greedy choice by attention mass is not
the optimum for any later measure; it is the best that a score per token and head can know of it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvarena.policies.base import TOKEN_SCORE, LayerView, Needs, Policy


@dataclass(kw_only=True)
class Oracle(Policy):
    """No options of its own."""

    columns: ClassVar[tuple[str, ...]] = (TOKEN_SCORE,)
    bounded: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        return Needs(token_scores="answer")

    def score(self, view: LayerView) -> Tensor:
        return view.columns[TOKEN_SCORE].clone()
