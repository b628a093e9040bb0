"""NACL: keep what the last queries look at, and a random draw that favours it.

The attention of the last ``proxies`` queries, summed per token, ranks the tokens; a draw without
replacement, with probabilities softmax(sum), ranks them too, differently in each layer and head. A
token stays if it is among the first of either ranking; ``random_share`` of the places fall to the
draw.
Paper: "NACL: A General and Effective KV Cache Eviction Framework for LLMs at Inference Time",
https://arxiv.org/abs/2408.03675, Algorithm 1. Default share: 12 places of 18, as in its Table 4 at
a budget of 20%; the released code has 7 of 19. The number of proxies is SnapKV's window; the paper
takes up to a fifth of the prompt, the code a hundredth.

Differs from the paper: eviction comes after each chunk, where its last queries are the proxies, and
goes on while decoding, where there is one. Luck is a fixed number of position, layer and KV head
(Gumbel noise on the sum), so a lucky token stays so. Where both rankings hold the same token, both
have their next one stay, as a budget must be filled. Proxies stay, as in the paper; the code keeps
sinks as well. A KV head goes by the mean over its query heads. Where heads compete for a budget
(shape=ada, global), places are alike in all heads, which then get nearly equal shares.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy, in_text_order

# Odd numbers without a pattern: the golden ratio's bits, and MurmurHash3's two that spread a bit of
# the input over all of the output. Signed, as torch multiplies modulo 2^64.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0xAE502812AA7333, -0x3B314601E57A13AD
_BITS = 23  # so that no number becomes 0 or 1 in float32


@dataclass(kw_only=True)
class NACL(Policy):
    """proxies: last queries that rank; random_share: places for the draw; seed: of the draw."""

    proxies: int = 32
    random_share: float = 0.6667
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proxies < 1:
            raise ValueError(f"proxies must be >= 1 query, got {self.proxies}")
        if not 0 < self.random_share < 1:
            raise ValueError(f"random_share must be between 0 and 1, got {self.random_share}")

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.proxies)

    def num_recent(self, budget_tokens: int) -> int:
        return max(self.recent, self.proxies)

    def score(self, view: LayerView) -> Tensor:
        assert view.attention is not None, "the engine hands over what needs asks for"
        S, K, T = view.positions.shape
        looked_at = view.attention.sum(dim=-2).view(S, K, -1, T).mean(dim=2)
        both = torch.stack((looked_at, looked_at - self._bad_luck(view)))  # [2, S, K, T]
        # In the order of the text, so that of equal ones the older comes first.
        ranks = view.text_ranks
        both = in_text_order(both, ranks)
        order = both.argsort(dim=-1, descending=True, stable=True)
        numbers = torch.arange(1, T + 1, device=both.device)
        places = torch.stack((numbers / (1 - self.random_share), numbers / self.random_share))
        places = torch.empty_like(both).scatter_(
            -1, order, places.to(both.dtype)[:, None, None].expand_as(both)
        )
        return -places.amin(dim=0).gather(-1, ranks)

    def _bad_luck(self, view: LayerView) -> Tensor:
        """[S, K, T], minus Gumbel noise: the largest log p less it are a draw with chances p."""
        first = 1 + (view.kv_heads.start or 0)
        heads = torch.arange(first, first + view.positions.shape[1], device=view.positions.device)
        of_head = _mixed(_mixed(_mixed(heads) + self.seed) + view.layer)[:, None]  # [K, 1]
        drawn = _mixed(of_head + view.positions) >> (64 - _BITS) & (1 << _BITS) - 1
        return ((drawn + 0.5) / (1 << _BITS)).log_().neg_().log_()


def _mixed(numbers: Tensor) -> Tensor:
    """int64 of any shape, each turned into one whose first bits look drawn by chance."""
    mixed = numbers * _STEP
    for factor in (_FIRST, _SECOND):
        mixed = (mixed ^ (mixed >> 33)) * factor
    return mixed
