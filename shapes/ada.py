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
        floor = round(self.alpha * budget_tokens)
        safe = []
        for own in scores:
            best = own.topk(min(floor, len(own))).indices
            safe.append(own.index_fill(0, best, float("inf")))
        total = len(scores) * budget_tokens
        heads = torch.arange(len(scores), device=safe[0].device)
        head_of_token = heads.repeat_interleave(
            torch.tensor([len(own) for own in safe], device=heads.device)
        )
        best = torch.cat(safe).argsort(descending=True, stable=True)[:total]
        return torch.bincount(head_of_token[best], minlength=len(scores)).tolist()
