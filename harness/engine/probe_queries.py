"""How much attention tokens get from a few probe queries, kept while a prompt comes in chunks.

ZipCache (https://arxiv.org/abs/2405.14256) weighs each token by the attention of 5 %
newest and 5 % random queries, divided by how many queries could see it. A prompt that comes in
chunks has no "all queries" at hand, so probes are kept from the start: whether a query is one of
the random ones depends on its position alone, which makes the choice the same for any chunk size.

Shape letters: H query heads, K KV heads, P probes, Q queries of this pass, T tokens, D head dim.
"""

import torch
from torch import Tensor

from kvarena.codecs.base import Probes
from kvarena.harness.engine.attention import AttentionSpec, explicit_weights

# Multiplicative hashing of a position to 32 bits (Knuth, TAOCP 6.4): spreads neighbours evenly.
_GOLDEN = 2654435761


class ProbeStore:
    """The probe queries of one sequence in one layer."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._queries: Tensor | None = None  # [H, P, D]
        self._positions: Tensor | None = None  # [P] int32

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """Take this pass's queries [H, Q, D] at ``positions`` [Q]; drop those no longer wanted."""
        positions = positions.int()
        if self._queries is not None and self._positions is not None:
            queries = torch.cat([self._queries, queries], dim=1)
            positions = torch.cat([self._positions, positions])
        num_seen = int(positions[-1]) + 1
        num_recent = -int(-num_seen * self._probes.recent // 1)  # rounded up
        drawn = (positions.long() * _GOLDEN) % 2**32 < self._probes.random * 2**32
        wanted = drawn | (positions >= num_seen - num_recent)
        self._queries, self._positions = queries[:, wanted], positions[wanted]

    def saliency(
        self,
        keys: Tensor,
        key_positions: Tensor,
        spec: AttentionSpec,
        wanted: slice = slice(None),
    ) -> Tensor:
        """[K, W] float32: attention of the probes per query that could see the key.

        keys: [K, T, D], the tokens that share the attention; key_positions: [K, T]; wanted: the W
        of the T keys that are weighed.
        """
        assert self._queries is not None, "observe comes first"
        assert self._positions is not None
        probes = self._positions
        visible = key_positions[:, None, :] <= probes[None, :, None]  # [K, P, T]
        if spec.sliding_window is not None:
            near = key_positions[:, None, :] > probes[None, :, None] - spec.sliding_window
            visible &= near
        queries = self._queries.to(keys.dtype)[None]
        weights = explicit_weights(queries, keys[None], visible[None], spec)[0]  # [K, G, P, T]
        # A probe older than every kept token sees nothing, which a softmax cannot express.
        mass = weights[..., wanted].nan_to_num(nan=0.0).sum(dim=(1, 2))
        if self._probes.count == "text":
            return mass / (probes[-1] + 1 - key_positions[:, wanted])
        return mass / visible[..., wanted].sum(dim=1).clamp(min=1)

    @property
    def nbytes(self) -> int:
        if self._queries is None or self._positions is None:
            return 0
        return self._queries.nbytes + self._positions.nbytes
