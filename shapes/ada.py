"""Ada: the heads of a layer share its budget by their scores.

The K * N best tokens of a layer stay, whichever head they are of; but first every head keeps its
own best alpha * N, so that none is left with nothing.
Paper: "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
Inference", https://arxiv.org/abs/2407.11550, section 3.3; alpha 0.2 is its safeguard.

Differs from the paper: it goes with every score, not with attention weights alone, so a score must
mean the same in every head of a layer; equal scores go to the earlier head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvarena.shapes.base import Shape


@dataclass(kw_only=True)
class Ada(Shape):
    """alpha: share of N that each head keeps whatever the others score; 1 is uniform."""

    scope: ClassVar[Literal["head", "layer", "model"]] = "layer"

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be a number from 0 to 1, got {self.alpha!r}")

    def head_tokens(self, scores: Sequence[Tensor], budget_tokens: int) -> list[int]:
        held = [len(own) for own in scores]
        num_going = sum(held) - len(held) * budget_tokens
        floor = round(self.alpha * budget_tokens)
        # A head that stays above its floor whatever goes needs no guard, as mostly while decoding.
        guarded = [own if len(own) - num_going >= floor else _guard(own, floor) for own in scores]
        together = torch.cat(guarded)
        lowest = together.topk(num_going, largest=False).values
        limit = lowest.max()
        goes = together < limit
        # Of those that are as good as the best that goes, the ones of the last heads go.
        as_good = (together == limit).nonzero()[:, 0]
        goes[as_good[len(as_good) - int((lowest == limit).sum()) :]] = True
        ends = torch.tensor(held, device=goes.device).cumsum(0)
        gone_up_to = goes.cumsum(0)[ends - 1].tolist()
        before = [0, *gone_up_to[:-1]]
        return [
            num - (gone - less) for num, gone, less in zip(held, gone_up_to, before, strict=True)
        ]


def _guard(scores: Tensor, floor: int) -> Tensor:
    """Scores [T] with the best ``floor`` of them at +inf."""
    best = scores.topk(min(floor, len(scores))).indices
    return scores.index_fill(0, best, float("inf"))
