"""Mean and covariance of the queries that each head of one layer has had so far.

They are merged chunk by chunk and not summed up: float32 sums of queries with a large mean would
leave no digits for their spread. Paper: "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances" (Chan, Golub and LeVeque, 1979).

Shape letters: S slots, H query heads, Q queries of this pass, D head dim.
"""

import torch
from torch import Tensor

from kvarena.policies.base import at_least_float32


class QueryStatistics:
    """Of each slot, in float32 or wider: mean [H, 1, D], covariance [H, D, D] (biased: divided by
    the number of queries), that number [1, 1, 1]; all 0 before the first query that counts.

    Allocated with the first queries. num_skipped: first tokens of the text that do not count.
    """

    def __init__(self, num_slots: int, num_skipped: int, *, with_covariance: bool) -> None:
        self._num_slots, self._num_skipped = num_slots, num_skipped
        self._with_covariance = with_covariance
        self._buffers: list[Tensor] = []

    @torch.inference_mode()  # as passes are, which allocate
    def clear(self, slot: int) -> None:
        """Forget the queries of the request that was here before."""
        for buffer in self._buffers:
            buffer[slot] = 0

    def copy_slot(self, source: int, target: int, origin: "QueryStatistics") -> None:
        """Know of ``target`` what ``origin`` knows of ``source``."""
        if not self._buffers:
            shapes = [(self._num_slots, *one.shape[1:]) for one in origin._buffers]
            self._buffers = [
                one.new_zeros(shape) for one, shape in zip(origin._buffers, shapes, strict=True)
            ]
        for own, other in zip(self._buffers, origin._buffers, strict=True):
            own[target] = other[source]

    def observe(self, slots: slice, queries: Tensor, positions: Tensor) -> None:
        """Take this pass's queries [S, H, Q, D], before rotary positions, at ``positions`` [S, Q].

        How many count is a number on the device: nothing waits for it.
        """
        queries = at_least_float32(queries)
        if not self._buffers:
            self._allocate(queries)
        counts, means, *covariances = (buffer[slots] for buffer in self._buffers)
        counted = (positions >= self._num_skipped).to(queries.dtype)[:, None, :, None]
        num_new = counted.sum(dim=2, keepdim=True)  # [S, 1, 1, 1]
        counts += num_new
        share = num_new / counts.clamp_min(1)  # of the new ones among all
        new_means = (queries * counted).sum(dim=2, keepdim=True) / num_new.clamp_min(1)
        steps = new_means - means  # [S, H, 1, D]
        means += share * steps
        for covariance in covariances:
            deviations = (queries - new_means) * counted
            spread = deviations.transpose(-1, -2) @ deviations / num_new.clamp_min(1)
            spread += (1 - share) * steps.transpose(-1, -2) * steps  # between the two means
            covariance.lerp_(spread, share)

    def of(self, slots: slice) -> tuple[Tensor, Tensor | None]:
        """Means [S, H, 1, D] and covariances [S, H, D, D], or None if nobody asked for them."""
        assert self._buffers, "observe comes first"
        _, means, *covariances = self._buffers
        return means[slots], covariances[0][slots] if covariances else None

    @property
    def nbytes(self) -> int:
        """Of all slots."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def slot_nbytes(self) -> int:
        return self.nbytes // self._num_slots

    def _allocate(self, queries: Tensor) -> None:
        _, num_heads, _, head_dim = queries.shape
        shapes = [(1, 1, 1), (num_heads, 1, head_dim)]
        if self._with_covariance:
            shapes.append((num_heads, head_dim, head_dim))
        self._buffers = [queries.new_zeros(self._num_slots, *shape) for shape in shapes]
