"""LagKV: keep the tokens that stand out from the partition of the text that follows theirs.

Tokens in the order of the text, after the first ``sinks``, form partitions of ``lag_size``. Keys
and values of a partition are scaled by the minimum and maximum of each channel in the next one; a
token scores the standard deviation over its scaled channels, as a softmax over the partition, sum
of keys' and values'. Its rank inside its partition decides, so all partitions shrink alike.
Paper: "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
https://arxiv.org/abs/2504.04704. Defaults: partitions of 128 and 4 sinks, as in kvpress; the
authors' class has 1024 and 16.

The last whole partition has none after it, and what follows is no partition: both stay, oldest
first to go if something must. Their newest ``lag_size`` tokens, at most half the budget, are
protected. Without that protection (protect=none) partitions begin at the first token, and the last
one, with what follows, is scaled by itself.

Differs from the paper: a partition is not shrunk once to a fixed share of its size; after each
chunk or token, partitions are formed anew from what is cached, as many tokens go as the budget
says, and of equal ranks the newest goes. Where heads compete for a budget (shape=ada, global),
ranks are alike in all heads, which then get nearly equal shares.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.policies.base import LayerView, Policy, in_text_order

_SMALLEST_RANGE = 1e-6  # a channel may be constant in a partition


@dataclass(kw_only=True)
class LagKV(Policy):
    """lag_size: tokens of a partition."""

    sinks: int = 4
    lag_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag_size < 2:
            raise ValueError(f"lag_size must be >= 2 tokens, got {self.lag_size}")

    def num_recent(self, budget_tokens: int) -> int:
        return max(self.recent, min(self.lag_size, budget_tokens // 2))

    def score(self, view: LayerView) -> Tensor:
        ranks = view.text_ranks
        T = ranks.shape[-1]
        places = torch.arange(T, device=ranks.device)
        order = in_text_order(places.expand_as(ranks), ranks)
        first = self.sinks if view.num_recent else 0
        num_judged = max((T - first) // self.lag_size - 1, 0)  # partitions with a next one
        last = first + num_judged * self.lag_size
        # More than any rank inside a partition, in the order of the text: the newest stay.
        scores = (1 + places / T).expand(ranks.shape).clone()
        if num_judged:
            parts = order[..., first : last + self.lag_size].unflatten(-1, (num_judged + 1, -1))
            scores[..., first:last] = _ranks(view, parts, lag=1).flatten(-2)
        if not view.num_recent:
            scores[..., last:] = _ranks(view, order[..., None, last:], lag=0).squeeze(-2)
        return scores.gather(-1, ranks)


def _ranks(view: LayerView, parts: Tensor, lag: int) -> Tensor:
    """Of each token the share of its partition that scores less, [S, K, P - lag, L].

    parts: [S, K, P, L] places in storage; each is scaled by the one that comes ``lag`` later.
    """
    scores = _information(view.keys, parts, lag) + _information(view.values, parts, lag)
    return scores.argsort(dim=-1).argsort(dim=-1) / scores.shape[-1]


def _information(states: Tensor, parts: Tensor, lag: int) -> Tensor:
    """[S, K, P - lag, L]: softmax of how much a token's channels differ, once they are scaled."""
    S, K, _, D = states.shape
    sequences = torch.arange(S, device=states.device).view(S, 1, 1, 1)
    heads = torch.arange(K, device=states.device).view(K, 1, 1)
    states = states[sequences, heads, parts]  # [S, K, P, L, D], whole tokens, faster than gather
    reference = states[:, :, lag:]
    low, high = reference.amin(dim=-2, keepdim=True), reference.amax(dim=-2, keepdim=True)
    scale = (high - low).clamp_min_(_SMALLEST_RANGE).reciprocal_()
    own = states[:, :, : states.shape[2] - lag]
    scaled = torch.addcmul(-low * scale, own, scale)
    # The standard deviation by squares: torch's own takes thirty times as long on a CPU.
    squares = scaled.norm(dim=-1).square_() - D * scaled.mean(dim=-1).square_()
    return (squares.clamp_min_(0) / (D - 1)).sqrt_().softmax(dim=-1)
