"""What a codec is: how a kept token is stored once it has left the exact window.

A policy says which tokens stay, a codec says in how many bits. The engine keeps the newest tokens
exact, hands over a block of tokens when they have aged out of that window (after eviction), and
decodes one layer at a time for attention. A block is coded once and never again: what is evicted
from it later is marked, and a block with too many gaps is packed anew from its codes.
To add one: a file here with a ``Codec`` subclass, and ``conf/codec/<file name>.yaml``.

Shape letters: M heads that code a block together, R rows (tokens) per head, D head dim, C blocks, N
rows of all heads of all those blocks. Row r of two heads need not be the same token, since heads
evict on their own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvarena.policies.base import check_option_types


@dataclass(frozen=True, kw_only=True)
class Block:
    """Coded tokens, immutable: a subclass adds the tensors and bytes that are really held."""

    num_heads: int
    num_rows: int

    @cached_property
    def nbytes(self) -> int:
        """Bytes of everything held, scales, maps and codebooks included; asked for every pass."""
        held = [getattr(self, field.name) for field in fields(self)]
        return sum(
            part.nbytes if isinstance(part, Tensor) else len(part)
            for part in held
            if isinstance(part, Tensor | bytes)
        )


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Queries that are kept to weigh tokens before they are coded.

    recent: share of the text so far whose newest queries are kept; random: share of all queries,
    drawn uniformly; count: which queries a token's attention is divided by, "probes" that can see
    it or all of the "text" that can.
    """

    recent: float
    random: float
    count: str


@dataclass(kw_only=True)
class Codec(ABC):
    """Base of all codecs; options are dataclass fields and are checked for type and range.

    window: the newest so many tokens of each head stay exact; block: tokens coded at once.
    """

    window: int = 128
    block: int = 64

    # False only for a codec that leaves every token exact.
    codes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_option_types(self)
        if self.window < 0:
            raise ValueError(f"window must be >= 0 tokens, got {self.window}")
        if self.block < 1:
            raise ValueError(f"block must be >= 1 token, got {self.block}")

    @property
    def probes(self) -> Probes | None:
        """What ``encode`` wants to know of attention; None: no saliency is computed."""
        return None

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor, saliency: Tensor | None) -> Block:
        """Code keys and values [M, R, D], any float type, post-RoPE; saliency [M, R] if asked for.

        Raises ValueError for numbers that are not finite.
        """

    @abstractmethod
    def decode(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """Keys and values [N, D], float32, of any blocks of one head dim.

        One block's rows come after the other's, and in a block one head's after the other's.
        """

    def attend(
        self, query: Tensor, blocks: Sequence[Block], live: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor] | None:
        """Attention over blocks that stay coded; None where they must be decoded for it.

        query: [H', Q, D] of all heads that the blocks are of, H' = M * G, at tokens after all of
        the blocks'; live: [C, M, R] rows that are still there, None for all of them. The blocks
        have the same M and R. Returns output [H', Q, D] and log-sum-exp [H', Q], both float32.
        """
        return None

    @abstractmethod
    def take(self, block: Block, rows: Tensor) -> Block:
        """A block of the given rows ([M, R'], integers) of each head, decoding to the same numbers.

        Codes are moved, never decoded and coded again.
        """

    def coarser(self) -> "Codec | None":
        """This codec at the next fewer bits, for a budget in bytes; None: there are none."""
        return None


def merge(outputs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all tokens from that over parts of them: [P, ..., D], [P, ...] to [..., D].

    A part weighs as much as its sum of exponentials: softmax, split by the distributive law.
    """
    total = log_sums.logsumexp(dim=0)
    # Where no part has a token, -inf - -inf is not a number, but means nothing.
    shares = (log_sums - total).exp().nan_to_num(nan=0.0)
    return (outputs * shares[..., None]).sum(dim=0), total


def heads_of_rows(blocks: Sequence[Block], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which head of all blocks has each row, [N], and which block each head, [sum of M]."""
    # By numpy, which repeats in a tenth of the time of torch.
    blocks_of_heads = np.repeat(np.arange(len(blocks)), [block.num_heads for block in blocks])
    num_rows = np.array([block.num_rows for block in blocks])[blocks_of_heads]
    heads = np.repeat(np.arange(len(num_rows)), num_rows)
    return torch.from_numpy(heads).to(device), torch.from_numpy(blocks_of_heads).to(device)
