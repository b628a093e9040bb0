"""CAOTE: drop the token without which the attention output would change least.

If a token with weight a and value v goes, the softmax shares its weight among the others, and the
output o moves by exactly a / (1 - a) * norm2(o - v). A token that is looked at but says what the
others say may go, one with a value of its own stays.
Paper: "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token Eviction",
https://arxiv.org/abs/2504.14051, Theorem 3.2. Its plain form takes the weights of the last query
(TOVA's score, ``window=1``, the default); the mean over the last ``window`` queries stands for the
scores that sum over queries, scaled to a sum of 1.

Differs from the paper: weights and outputs are those of each query head, and a KV head goes by the
mean of its query heads' scores. Only what a pass's last queries see counts, so at the end of a
chunk one score chooses all tokens that go, though it is exact for one (as in the paper, which reads
prompts in blocks of 128). No token is protected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy


@dataclass(kw_only=True)
class CAOTE(Policy):
    """window: last queries of a pass whose mean attention weighs the tokens."""

    window: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be >= 1 query, got {self.window}")

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.window)

    def score(self, view: LayerView) -> Tensor:
        assert view.attention is not None, "the engine hands over what needs asks for"
        S, K, T = view.positions.shape
        values = view.values  # [S, K, T, D]
        weights = view.attention.mean(dim=-2).view(S, K, -1, T).to(values.dtype)  # of query heads
        outputs = weights @ values  # [S, K, G, D]
        # norm2(o - v)^2 term by term, as the differences would be G times the size of the values.
        squares = (outputs @ values.transpose(-1, -2)).mul_(-2)  # [S, K, G, T]
        squares += outputs.square().sum(dim=-1, keepdim=True)
        squares += values.norm(dim=-1).square_().unsqueeze(2)
        distances = squares.clamp_min_(0).sqrt_()
        # A token with all of the weight stays; its distance is 0 but for rounding.
        others = (1 - weights).clamp_min_(torch.finfo(values.dtype).eps)
        return distances.mul_(weights).div_(others).mean(dim=2)
