"""SnapKV: keep what the last queries look at, its neighbourhood, and the window they came from.

The attention of the last ``window`` queries is summed per key and pooled over neighbouring
positions in each query head, then averaged over the query heads that share a KV head; the window
itself always stays.
Paper: "SnapKV: LLM Knows What You are Looking for Before Generation",
https://arxiv.org/abs/2404.14469. Defaults: the authors' LongBench configuration (window 32, kernel
7, max pooling); their class defaults are 64, 5, avg.

Differs from the paper: the window is the end of each chunk, so selection happens once per chunk and
not once per prompt; and eviction goes on while decoding, where a pass has one query and only that
one votes. The released code repeats keys and values for every query head, and each keeps a set of
its own, in as many times the memory as there are query heads to a KV head; here a KV head keeps one
set, by the mean over its query heads, as kvpress does.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy, in_text_order


@dataclass(kw_only=True)
class SnapKV(Policy):
    """window: queries that vote; kernel: neighbours pooled (odd); pooling: max | avg."""

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be >= 1 query, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and >= 1, got {self.kernel}")
        if self.pooling not in ("max", "avg"):
            raise ValueError(f"pooling must be max or avg, got {self.pooling!r}")

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.window)

    def num_recent(self, budget_tokens: int) -> int:
        return max(self.recent, self.window)

    def score(self, view: LayerView) -> Tensor:
        assert view.attention is not None, "the engine hands over what needs asks for"
        S, K, T = view.positions.shape
        votes = view.attention.sum(dim=-2).view(S, K, -1, T)  # of each query head
        ranks = view.text_ranks
        votes = in_text_order(votes, ranks.unsqueeze(2)).flatten(1, 2)  # [S, H, T]
        # The window is kept anyway, where it is protected, and must not lift its neighbours.
        votes[..., T - min(self.window, view.num_recent) :] = 0
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(votes, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.view(S, K, -1, T).mean(dim=2).gather(-1, ranks)
