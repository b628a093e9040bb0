"""The packed row of a pass: which slots bring which tokens, and which of them work as one batch.

The tokens of all working slots stand in one row [1, total] without padding. Neighbouring slots that
hold equally many tokens and bring equally many new ones form a run.

Shape letters: S slots of a run, Q new tokens per slot, T = kept and new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from kvarena.harness.engine.active_request import ActiveRequest
from kvarena.harness.engine.attention import visible_tokens
from kvarena.harness.engine.layer_cache import LayerCache


class Portion(NamedTuple):
    """What one slot brings to a pass."""

    slot: int
    active: ActiveRequest
    token_ids: list[int]


@dataclass(kw_only=True)
class Observed:
    """What a pass did to the slots of one run, noted while it happened.

    kernels: what computed attention outputs; score_sums: by layer, [S] sums of the policy's scores,
    which are finite only if every score is.
    """

    kernels: set[str] = field(default_factory=set)
    score_sums: dict[int, Tensor] = field(default_factory=dict)

    def first_layers_not_finite(self, num_slots: int) -> list[int | None]:
        """Of each slot, the first layer with a score that is no finite number; else None."""
        if not self.score_sums:
            return [None] * num_slots
        layers = list(self.score_sums)
        is_broken = ~torch.stack(list(self.score_sums.values()), dim=1).isfinite()  # [S, layers]
        if not is_broken.any():
            return [None] * num_slots
        return [layers[row.index(True)] if any(row) else None for row in is_broken.tolist()]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Contiguous slots that do the same amount of work in this pass.

    row: their tokens in the packed row, slot after slot; limit_tokens: what a head may hold after
    the pass, None if nothing is ever evicted; positions: [S, Q] of the new tokens in the original
    text; text_tokens: of the longest text so far; observed: filled in by the pass.
    """

    slots: slice
    row: slice
    num_new: int
    limit_tokens: int | None
    positions: Tensor
    text_tokens: int
    observed: Observed = field(default_factory=Observed)

    @property
    def num_slots(self) -> int:
        return self.slots.stop - self.slots.start

    @cached_property
    def next_position(self) -> Tensor:
        """[S, 1, 1]: place in the text of the token after this pass."""
        return self.positions[:, -1:, None] + 1

    def num_kept(self, num_tokens: int) -> int:
        """How many of T tokens a head holds after the pass."""
        return num_tokens if self.limit_tokens is None else min(num_tokens, self.limit_tokens)

    def num_evicted_before(self, num_tokens: int) -> Tensor:
        """[S]: how far the original positions run ahead of the ranks among T tokens."""
        return self.positions[:, 0] - (num_tokens - self.num_new)

    def causal_mask(self, num_tokens: int) -> Tensor | None:
        """The mask over T tokens without a sliding window, built once for all layers with that T.

        None if every query sees everything.
        """
        if num_tokens not in self._causal_masks:
            places = torch.empty(1, 1, num_tokens, device=self.positions.device)
            mask = visible_tokens(self.positions, places, self.num_new, None)
            self._causal_masks[num_tokens] = mask
        return self._causal_masks[num_tokens]

    @cached_property
    def _causal_masks(self) -> dict[int, Tensor | None]:
        return {}

    def unpack(self, packed: Tensor) -> Tensor:
        """[S, heads, Q, D] of this run from a packed [1, heads, total, D]."""
        rows = packed[0, :, self.row]
        shape = (rows.shape[0], self.num_slots, self.num_new, rows.shape[-1])
        return rows.reshape(shape).transpose(0, 1)


def pack_runs(
    portions: Sequence[Portion], layers: Sequence[LayerCache], positions: Tensor
) -> list[Run]:
    """Group portions of neighbouring slots that do the same work in every layer.

    positions: [total] of the packed row, in the order of ``portions``.
    """

    def work(place_and_portion: tuple[int, Portion]) -> tuple[object, ...]:
        place, portion = place_and_portion
        num_new = len(portion.token_ids)
        counts = [layer.counts[portion.slot] for layer in layers]
        # Neighbours have the same distance between slot and place in the list.
        return portion.slot - place, num_new, portion.active.limit_after(num_new), counts

    runs, start = [], 0
    for (_, num_new, limit_tokens, _), places in groupby(enumerate(portions), key=work):
        group = [portion for _, portion in places]
        assert isinstance(num_new, int), "as made above"
        assert limit_tokens is None or isinstance(limit_tokens, int), "as made above"
        row = slice(start, start + len(group) * num_new)
        runs.append(
            Run(
                slots=slice(group[0].slot, group[0].slot + len(group)),
                row=row,
                num_new=num_new,
                limit_tokens=limit_tokens,
                positions=positions[row].view(len(group), num_new),
                text_tokens=num_new + max(portion.active.num_seen for portion in group),
            )
        )
        start = row.stop
    return runs
