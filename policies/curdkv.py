"""CurDKV: keep the tokens with the longest keys and values, compared with their neighbours.

The product of the squared norms of key and value stands for the leverage score by which a CUR
decomposition would choose rows of the attention's matrices. Squared norms are divided by their sum
over blocks of ``window`` tokens in the order of the text, and the products by their sum.
Paper: "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition",
https://arxiv.org/abs/2509.15038. Defaults: the authors' code and kvpress (blocks of 16, 4 sinks,
product of both, no random projection).

Differs from the paper: the norms are of keys and values as they are, where the paper first projects
them on 20 random directions (off by default in its code); keys are those after rotary positions,
as the rotation leaves norms alone. Blocks begin at the first cached token, as in kvpress; in the
authors' code they end with the last one. They are formed anew after each chunk, of the tokens that
are left, so a block spans more of the text the longer it is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvarena.policies.base import LayerView, Policy, in_text_order

_SMALLEST_SUM = 1e-30  # a block of zeros scores 0, not NaN


@dataclass(kw_only=True)
class CurDKV(Policy):
    """window: tokens of a block whose norms are compared with each other."""

    sinks: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be >= 1 token, got {self.window}")

    def score(self, view: LayerView) -> Tensor:
        T = view.positions.shape[-1]
        squares = torch.stack([x.norm(dim=-1) for x in (view.keys, view.values)]).square_()
        ranks = view.text_ranks
        in_text = in_text_order(squares, ranks)  # [2, S, K, T]
        blocks = F.pad(in_text, (0, -T % self.window)).unflatten(-1, (-1, self.window))
        shares = _normalised(blocks).flatten(-2)[..., :T]
        return _normalised(shares[0] * shares[1]).gather(-1, ranks)


def _normalised(scores: Tensor) -> Tensor:
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(_SMALLEST_SUM)
