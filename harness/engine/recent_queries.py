"""The last queries of each sequence in one layer, for rules that look back over decode steps.

While decoding, a pass has one query; what the ones before it think of the tokens held now can only
be told from the queries themselves.

Shape letters: S slots, H query heads, K KV heads, W queries remembered, Q queries of this pass, T
cached tokens, D head dim.
"""

import torch
from torch import Tensor

from kvarena.harness.engine.attention import AttentionSpec, explicit_weights

_NONE = -1  # in place of a position, where no query was seen yet


class RecentQueries:
    """Post-RoPE queries [num_slots, H, W, D] in the model's dtype, oldest first, and where they
    stand in the text, int32 [num_slots, W]; allocated with the first ones.
    """

    def __init__(self, num_slots: int, num_queries: int) -> None:
        self._num_slots, self._num_queries = num_slots, num_queries
        self._queries: Tensor | None = None
        self._positions: Tensor | None = None

    @torch.inference_mode()  # as passes are, which allocate
    def clear(self, slot: int) -> None:
        """Forget the queries of the request that was here before."""
        if self._positions is not None:
            self._positions[slot] = _NONE

    def copy_slot(self, source: int, target: int, origin: "RecentQueries") -> None:
        """Remember in ``target`` what ``origin`` remembers in ``source``."""
        if origin._queries is None or origin._positions is None:
            return
        if self._queries is None or self._positions is None:
            shape = (self._num_slots, *origin._queries.shape[1:])
            self._queries = origin._queries.new_zeros(shape)
            self._positions = origin._positions.new_full((shape[0], shape[2]), _NONE)
        self._queries[target] = origin._queries[source]
        self._positions[target] = origin._positions[source]

    def observe(self, slots: slice, queries: Tensor, positions: Tensor) -> None:
        """Take this pass's queries [S, H, Q, D] at ``positions`` [S, Q]."""
        if self._queries is None or self._positions is None:
            shape = (self._num_slots, self._num_queries)
            self._queries = queries.new_zeros(
                shape[0], queries.shape[1], shape[1], queries.shape[3]
            )
            self._positions = positions.new_full(shape, _NONE, dtype=torch.int32)
        _push(self._queries[slots], queries, dim=2)
        _push(self._positions[slots], positions, dim=1)

    def rows(
        self, slots: slice, keys: Tensor, key_positions: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Softmax rows [S, H, W, T], float32 or wider, over keys [S, K, T, D] held now.

        A query sees no key younger than itself. The row of one that was not seen yet, or all of
        whose keys are gone, is 0. key_positions: [S, K, T].
        """
        assert self._queries is not None, "observe comes first"
        assert self._positions is not None
        at = self._positions[slots, None, :, None]  # [S, 1, W, 1]
        visible = key_positions[:, :, None] <= at
        if spec.sliding_window is not None:
            visible &= key_positions[:, :, None] > at - spec.sliding_window
        weights = explicit_weights(self._queries[slots], keys, visible, spec)
        # What is hidden has weight 0 already, except where all is, which is no number.
        return weights.masked_fill_(~visible[:, :, None], 0.0).flatten(1, 2)

    @property
    def nbytes(self) -> int:
        """Of all slots."""
        if self._queries is None or self._positions is None:
            return 0
        return self._queries.nbytes + self._positions.nbytes

    @property
    def slot_nbytes(self) -> int:
        return self.nbytes // self._num_slots


def _push(buffer: Tensor, new: Tensor, dim: int) -> None:
    """Have the last of ``new`` behind what the buffer held, which moves on to make room."""
    size, num_new = buffer.shape[dim], new.shape[dim]
    if num_new < size:
        new = torch.cat([buffer.narrow(dim, num_new, size - num_new), new.to(buffer.dtype)], dim)
    buffer.copy_(new.narrow(dim, new.shape[dim] - size, size))
