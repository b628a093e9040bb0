"""The packed row of a pass: which slots bring which tokens, and which of them work as one batch.

The tokens of all working slots stand in one row [1, total] without padding. Neighbouring slots that
hold equally many tokens and bring equally many new ones form a cohort.

Shape letters: S slots of a cohort, Q new tokens per slot, T = kept and new tokens.
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
from kvarena.harness.engine.eviction import Limit
from kvarena.harness.engine.layer_cache import LayerCache, Part
from kvarena.harness.engine.ragged_cache import RaggedCache


class Portion(NamedTuple):
    """What one slot brings to a pass."""

    slot: int
    active: ActiveRequest
    token_ids: list[int]


@dataclass(kw_only=True)
class Observed:
    """What a pass did to the slots of one cohort, noted while it happened.

    kernels: what computed attention outputs; has_evicted: whether anything went; score_sums: by
    layer, [S] sums of the policy's scores, which are finite only if every score is; waiting: scores
    [S, K, T] of parts of all layers, whose tokens are weighed against each other once the pass is
    through.
    """

    kernels: set[str] = field(default_factory=set)
    has_evicted: bool = False
    score_sums: dict[int, Tensor] = field(default_factory=dict)
    waiting: list[tuple[Part, Tensor]] = field(default_factory=list)

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
class Cohort:
    """Contiguous slots that do the same amount of work in this pass.

    row: their tokens in the packed row, slot after slot; limit: what heads may hold after the pass,
    None if nothing is ever evicted; mean_tokens: what they hold in the pass, with the new tokens,
    on average over all heads of all layers; positions: [S, Q] of the new tokens in the original
    text; text_tokens: of the longest text so far; token_scores: [S, L, K, Q] of the new tokens,
    where the policy needs them; observed: filled in by the pass.
    """

    slots: slice
    row: slice
    num_new: int
    limit: Limit | None
    mean_tokens: int
    positions: Tensor
    text_tokens: int
    token_scores: Tensor | None = None
    observed: Observed = field(default_factory=Observed)

    @property
    def num_slots(self) -> int:
        return self.slots.stop - self.slots.start

    @cached_property
    def next_position(self) -> Tensor:
        """[S, 1, 1]: place in the text of the token after this pass."""
        return self.positions[:, -1:, None] + 1

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
        """[S, heads, Q, D] of this cohort from a packed [1, heads, total, D]."""
        rows = packed[0, :, self.row]
        shape = (rows.shape[0], self.num_slots, self.num_new, rows.shape[-1])
        return rows.reshape(shape).transpose(0, 1)


def pack_cohorts(
    portions: Sequence[Portion],
    layers: Sequence[LayerCache | RaggedCache],
    positions: Tensor,
    evict_every: int,
) -> list[Cohort]:
    """Group portions of neighbouring slots that do the same work in every layer.

    positions: [total] of the packed row, in the order of ``portions``. A slot whose heads hold
    different numbers of tokens is alone.
    """
    is_ragged = any(isinstance(layer, RaggedCache) for layer in layers)

    def work(place_and_portion: tuple[int, Portion]) -> tuple[object, ...]:
        place, portion = place_and_portion
        num_new = len(portion.token_ids)
        counts = [layer.held_tokens(portion.slot) for layer in layers]
        # Neighbours have the same distance between slot and place in the list.
        apart = portion.slot if is_ragged else portion.slot - place
        return apart, num_new, portion.active.limit_after(num_new, evict_every), counts

    cohorts, start = [], 0
    for (_, num_new, limit, counts), places in groupby(enumerate(portions), key=work):
        group = [portion for _, portion in places]
        assert isinstance(num_new, int), "as made above"
        assert limit is None or isinstance(limit, Limit), "as made above"
        assert isinstance(counts, list), "as made above"
        heads = [count for layer_counts in counts for count in layer_counts]
        row = slice(start, start + len(group) * num_new)
        cohorts.append(
            Cohort(
                slots=slice(group[0].slot, group[0].slot + len(group)),
                row=row,
                num_new=num_new,
                limit=limit,
                mean_tokens=num_new + (sum(heads) // len(heads) if heads else 0),
                positions=positions[row].view(len(group), num_new),
                text_tokens=num_new + max(portion.active.num_seen for portion in group),
                token_scores=_token_scores(group),
            )
        )
        start = row.stop
    return cohorts


def _token_scores(group: Sequence[Portion]) -> Tensor | None:
    found = [portion.active.scores_of_next(len(portion.token_ids)) for portion in group]
    given = [scores for scores in found if scores is not None]
    return torch.stack(given) if given else None
