"""KeyDiff: keep the keys that differ most from the average key.

A key's score is minus its cosine similarity to an anchor that stands for all keys of the head. No
attention score is needed, so any attention kernel can be used.
Paper: "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments", https://arxiv.org/abs/2504.15364.

Its Eq. (8) averages L2-normalised keys, its experiments (section 3.2) average raw keys: ``anchor``
offers both, and the median and pairwise variants of its Table 15.

Differs from the paper: nothing in the rule, which protects no token, neither first nor newest ones.
The paper's Math-500 runs use a variant that also keeps a sliding window of the newest tokens; set
``recent`` for it (which share of the budget the authors took is not known here).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kvarena.policies.base import LayerView, Policy

_SMALLEST_NORM = 1e-8  # a key of zeros is like no other: its score is 0, not NaN


@dataclass(kw_only=True)
class KeyDiff(Policy):
    """anchor: raw | normalised | median | pairwise (the last is quadratic in the cached tokens)."""

    ANCHORS: ClassVar[tuple[str, ...]] = ("raw", "normalised", "median", "pairwise")

    anchor: str = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor not in self.ANCHORS:
            raise ValueError(
                f"anchor must be one of {', '.join(self.ANCHORS)}, got {self.anchor!r}"
            )

    def score(self, view: LayerView) -> Tensor:
        keys = view.keys  # [S, K, T, D]
        if self.anchor == "pairwise":
            directions = F.normalize(keys, dim=-1)
            return -(directions @ directions.transpose(-1, -2)).mean(dim=-1)
        # No step writes anything the size of the keys, as F.cosine_similarity would three times.
        norms = keys.norm(dim=-1).clamp_min(_SMALLEST_NORM)  # [S, K, T]
        anchor = F.normalize(self._anchor(keys, norms), dim=-1)
        return -(anchor @ keys.transpose(-1, -2)).squeeze(-2) / norms

    def _anchor(self, keys: Tensor, norms: Tensor) -> Tensor:
        """[S, K, 1, D]: the key that the others are compared with."""
        if self.anchor == "median":
            return keys.median(dim=-2, keepdim=True).values
        if self.anchor == "normalised":
            return norms.reciprocal().unsqueeze(-2) @ keys / keys.shape[-2]
        return keys.mean(dim=-2, keepdim=True)
