"""CriticalKV: half of the budget by attention, half by attention times what the value can add.

A token's part in a layer's output is its attention weight times its projected value, so its norm
bounds what is lost with it. ``first_share`` of what a head keeps goes to the best by a base score,
which guards against weights that are small now; the rest to the best by
(score + 0.0001) * norm1(W_O v), the norm being the mean over the query heads of a KV head.
Paper: "CriticalKV: Optimizing KV Cache Eviction from an Output Perturbation Perspective",
https://arxiv.org/abs/2502.03805, its two-stage selection. Defaults: those of the authors' code.

The paper puts it on top of other methods, SnapKV first, whose score is the base here: the mean
attention of the last ``window`` queries, pooled over ``kernel`` neighbours in the text (maximum),
mean over query heads. Window and kernel are as in policies/snapkv.py, and so is what differs: a
choice after each chunk, and by the one query of a pass while decoding.

Differs from the paper: protected tokens take no part in the first half, which is a share of what
is left. Where heads compete for a budget (shape=ada, global), each first gets its share of the mean
budget, and they compete for the rest.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy, in_text_order

_EPSILON = 1e-4  # so that a value can save a token that nothing looks at now
_FIRST = 1e18  # above every other score in any head, and a sum of many is still finite


@dataclass(kw_only=True)
class Critical(Policy):
    """window: queries that vote; kernel: neighbours pooled (odd); first_share: 0 to 1."""

    window: int = 32
    kernel: int = 7
    first_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be >= 1 query, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and >= 1, got {self.kernel}")
        if not 0 <= self.first_share <= 1:
            raise ValueError(f"first_share must be from 0 to 1, got {self.first_share}")

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.window, output_norms=True)

    def num_recent(self, budget_tokens: int) -> int:
        return max(self.recent, self.window)

    def score(self, view: LayerView) -> Tensor:
        assert view.output_norms is not None, "the engine hands over what needs asks for"
        ranks = view.text_ranks
        base = self._base(view, ranks)
        scores = (base.gather(-1, ranks) + _EPSILON) * view.output_norms
        num_first = int(self.first_share * max(view.num_kept - view.num_recent, 0))
        # Neighbours are often equal, being pooled: a stable sort leaves the newest of them last.
        order = base.argsort(dim=-1, stable=True)
        first = order[..., order.shape[-1] - num_first :]
        is_first = torch.zeros_like(base, dtype=torch.bool).scatter_(-1, first, True)
        return scores.masked_fill(is_first.gather(-1, ranks), _FIRST)

    def _base(self, view: LayerView, ranks: Tensor) -> Tensor:
        """SnapKV's score [S, K, T] in the order of the text, 0 for a window that is protected."""
        assert view.attention is not None, "the engine hands over what needs asks for"
        S, K, T = view.positions.shape
        votes = view.attention.mean(dim=-2).view(S, K, -1, T)  # of each query head
        in_text = in_text_order(votes, ranks.unsqueeze(2)).flatten(1, 2)  # [S, H, T]
        in_text[..., T - min(self.window, view.num_recent) :] = 0
        pooled = F.max_pool1d(in_text, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.view(S, K, -1, T).mean(dim=2)
