"""R-KV: keep what the last queries look at and no other key resembles.

A token scores lambda times its attention by the last ``window`` queries (mean, maximum over the
query heads of its KV head, then over ``kernel`` neighbours in the text), less (1 - lambda) times
its redundancy: the mean cosine of its key to all others, as a softmax over the tokens. Of the keys
a key is near to (cosine over ``threshold``) the newest does not count it, so that of repeated steps
of reasoning the last one stays.
Paper: "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
https://arxiv.org/abs/2505.24133. Defaults: the released code's. It evicts once in 128 tokens of an
answer, so run it with evict_every=128 to have it as published.

The last queries of the text vote, also those of earlier steps. They are the newest tokens as well
and stay; attention is shared out among the others only, as in the released code.

Differs from the paper: the prompt is compressed too, chunk by chunk. The maximum over query heads
is of their weights, where the code takes that of their logits. A key that is near to no other loses
nothing; the code drops its cosine to the first token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy, in_text_order


@dataclass(kw_only=True)
class RKV(Policy):
    """window: last queries that vote, and newest tokens that stay; kernel: neighbours pooled (odd);

    attention_share: lambda, 0 to 1; threshold: cosine above which two keys are near copies.
    """

    window: int = 8
    kernel: int = 7
    attention_share: float = 0.07
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be >= 1 query, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and >= 1, got {self.kernel}")
        for name in ("attention_share", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.window, rows_over_steps=True)

    def num_recent(self, budget_tokens: int) -> int:
        return max(self.recent, self.window)

    def score(self, view: LayerView) -> Tensor:
        redundancy = self._mean_cosines(view).softmax(dim=-1)
        return (
            self.attention_share * self._looked_at(view) - (1 - self.attention_share) * redundancy
        )

    def _looked_at(self, view: LayerView) -> Tensor:
        """[S, K, T], pooled over neighbours in the text."""
        assert view.attention is not None, "the engine hands over what needs asks for"
        S, K, T = view.positions.shape
        ranks = view.text_ranks
        is_window = ranks >= T - min(self.window, view.num_recent)
        weights = view.attention.view(S, K, -1, view.attention.shape[-2], T)
        weights = weights.masked_fill(is_window[:, :, None, None], 0.0)
        shares = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        votes = shares.mean(dim=-2).amax(dim=2)
        pooled = F.max_pool1d(
            in_text_order(votes, ranks), self.kernel, stride=1, padding=self.kernel // 2
        )
        return pooled.gather(-1, ranks)

    def _mean_cosines(self, view: LayerView) -> Tensor:
        """[S, K, T]: to the other keys, without those that spare it."""
        keys = F.normalize(view.keys, dim=-1)
        T, D = keys.shape[2:]
        positions = view.positions[:, :, None].int()
        sums = torch.zeros(keys.shape[:3], dtype=keys.dtype, device=keys.device)
        # D keys at a time against all, so that a block of cosines is as large as the keys.
        for first in range(0, T, D):
            cosines = keys[:, :, first : first + D] @ keys.transpose(-1, -2)  # [S, K, D, T]
            cosines.diagonal(offset=first, dim1=-2, dim2=-1).zero_()
            copies = torch.where(cosines > self.threshold, positions, -1)
            newest = copies.max(dim=-1, keepdim=True)
            spared = cosines.gather(-1, newest.indices)
            spared *= newest.values >= 0
            sums += cosines.sum(dim=-2)
            sums.scatter_add_(-1, newest.indices.squeeze(-1), -spared.squeeze(-1))
        return sums / T
