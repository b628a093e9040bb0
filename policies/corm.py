"""CORM: keep what the last queries still find important, and the newest tokens.

A token is important to a query that sees t tokens if its attention weight is at least 1 / t, which
is the mean; to any other query it is minor. Each of the last ``window`` queries has a vote.
Paper: "CORM: Cache Optimization with Recent Message for Large Language Model Inference",
https://arxiv.org/abs/2404.15949. The default window is SnapKV's, so that the two differ only in how
they count.

Differs from the paper: it has no budget, and drops a token as soon as all queries of the window
find it minor. Under a budget the tokens with the fewest votes go, and of equal ones (the many with
none) the one with the least attention. Votes are counted at the end of each chunk; while decoding,
a pass has one query and only that one votes, where the paper remembers the votes of earlier steps.
A KV head keeps one set, by the mean over its query heads. The newest ``window`` tokens stay, as the
paper's recent ones do.
"""

from dataclasses import dataclass

from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy


@dataclass(kw_only=True)
class CORM(Policy):
    """window: queries at the end of a pass that vote, and newest tokens that stay."""

    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be >= 1 query, got {self.window}")

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.window)

    def num_recent(self, budget_tokens: int) -> int:
        return max(self.recent, self.window)

    def score(self, view: LayerView) -> Tensor:
        assert view.attention is not None, "the engine hands over what needs asks for"
        S, K, T = view.positions.shape
        num_visible = (view.attention > 0).sum(dim=-1, keepdim=True)  # [S, H, W, 1]
        is_important = view.attention >= 1 / num_visible
        votes = is_important.sum(dim=-2).view(S, K, -1, T).sum(dim=2)  # of all query heads
        # At most 1, so that it only tells apart what has as many votes.
        return votes + view.attention.mean(dim=-2).view(S, K, -1, T).mean(dim=2)
