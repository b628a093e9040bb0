"""Coded blocks as the store holds them: whose rows they are, and which of those are alive.

Shape letters: M heads that code a block together, R rows of a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from kvarena.codecs.base import Block

_DECODED_AT_ONCE = 8  # blocks


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

    @property
    def nbytes(self) -> int:
        return self.block.nbytes + self.live.nbytes

    def only(self, alive: NDArray[np.bool_]) -> "Segment":
        """The same block with the rows ``alive`` [M, R]."""
        counts = tuple(alive.sum(axis=1).tolist())
        return replace(self, live=np.packbits(alive, axis=1), counts=counts)


def alike(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Neighbours to decode together: of one shape, and few enough that this takes little memory."""
    for _, group in groupby(segments, _same_shape):
        same = list(group)
        for start in range(0, len(same), _DECODED_AT_ONCE):
            yield same[start : start + _DECODED_AT_ONCE]


def _same_shape(segment: Segment) -> tuple[tuple[int, ...], int]:
    """What segments must share to be decoded together."""
    return segment.heads, segment.block.num_rows
