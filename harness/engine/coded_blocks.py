"""Coded blocks as the store holds them: whose rows they are, and which of those are alive.

Shape letters: M heads that code a block together, R rows of a block, N rows of all heads of some
blocks in the order in which a codec decodes them, L of them alive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarena.codecs.base import Block

# Decoded together: 1 MB of SmolLM2's numbers, and about as much for what they are made from. KIVI
# decodes a sample of 2000 tokens in 1.4 s with 2048, 1.2 s with 4096, 1.0 s with 16384; but under
# KVComp a 4000-token prompt takes 57 to 72 MB at its peak with 2048, 63 to 88 with 4096.
_ROWS_AT_ONCE = 2048

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A block, the heads it belongs to, and which of its rows are alive.

    live: packed bits [M, ceil(R / 8)]; counts: live rows of each head.
    """

    heads: tuple[int, ...]
    block: Block
    live: NDArray[np.uint8]
    counts: tuple[int, ...]

    @property
    def rows(self) -> NDArray[np.bool_]:
        """[M, R]: which rows are alive."""
        return np.unpackbits(self.live, axis=1, count=self.block.num_rows).astype(bool)

    @cached_property
    def nbytes(self) -> int:
        return self.block.nbytes + self.live.nbytes

    def only(self, alive: NDArray[np.bool_]) -> "Segment":
        """The same block with the rows ``alive`` [M, R]."""
        counts = tuple(alive.sum(axis=1).tolist())
        return replace(self, live=np.packbits(alive, axis=1), counts=counts)


@dataclass(frozen=True)
class LiveRows:
    """Live rows of segments in the order of the text, one head's after the other's.

    rows: [L] which of the N; bits: [L] which of all bits of the maps; counts: how many by head.
    """

    rows: Ints
    bits: Ints
    counts: Ints


def live_rows(segments: Sequence[Segment], num_heads: int) -> LiveRows:
    """All at once, for a loop over segments and heads would take longer than decoding them."""
    counts = [count for segment in segments for count in segment.counts]
    heads = np.repeat([head for segment in segments for head in segment.heads], counts)
    # A head's map ends at a whole byte, so bits and rows are numbered apart.
    padding = np.repeat(
        [-segment.block.num_rows % 8 for segment in segments],
        [len(segment.heads) for segment in segments],
    )
    bits = np.unpackbits(joined_maps(segments)).nonzero()[0]
    rows = bits - np.repeat(padding.cumsum() - padding, counts)
    order = heads.argsort(kind="stable")
    return LiveRows(rows[order], bits[order], np.bincount(heads, minlength=num_heads))


def joined_maps(segments: Sequence[Segment]) -> NDArray[np.uint8]:
    return np.concatenate([segment.live.ravel() for segment in segments])


def struck(segments: Sequence[Segment], fates: NDArray[np.bool_], num_heads: int) -> list[Segment]:
    """The segments without the live rows that ``fates`` [L], as in LiveRows, leaves out."""
    alive = np.unpackbits(joined_maps(segments))
    alive[live_rows(segments, num_heads).bits] = fates
    maps = np.packbits(alive)
    left, end = [], 0
    for segment in segments:
        start, end = end, end + segment.live.size
        own = maps[start:end].reshape(segment.live.shape)
        if not np.array_equal(own, segment.live):
            counts = alive[8 * start : 8 * end].reshape(len(own), -1).sum(axis=1)
            segment = replace(segment, live=own.copy(), counts=tuple(counts.tolist()))
        left.append(segment)
    return left


def are_alike(segments: Sequence[Segment], num_heads: int) -> bool:
    """Whether there are any, each of them of all heads and with as many rows as the others."""
    shapes = {(len(segment.heads), segment.block.num_rows) for segment in segments}
    return len(shapes) == 1 and next(iter(shapes))[0] == num_heads


def live_map(segments: Sequence[Segment], device: torch.device) -> Tensor | None:
    """Which rows of segments that are alike are alive, bool [C, M, R]; None: all of them."""
    if all(count == segment.block.num_rows for segment in segments for count in segment.counts):
        return None
    return torch.from_numpy(np.stack([segment.rows for segment in segments])).to(device)


def parts(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """The segments by turns, as many together as may be decoded at once."""
    part: list[Segment] = []
    num_rows = 0
    for segment in segments:
        num_rows += len(segment.heads) * segment.block.num_rows
        if part and num_rows > _ROWS_AT_ONCE:
            yield part
            part, num_rows = [], len(segment.heads) * segment.block.num_rows
        part.append(segment)
    if part:
        yield part
