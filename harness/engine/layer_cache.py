"""The bounded KV store of one layer: a fixed number of places per slot and KV head.

A sequence owns a slot. Its live tokens fill places [0, T) of the slot in any order: keys are stored
post-RoPE with their original position beside them and attention does not care about order, so
eviction fills holes instead of shifting everything.

Shape letters: S slots of a cohort (a contiguous range of slots that share T), K KV heads, T live
tokens, Q tokens of this pass, D head dim, E tokens to evict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvarena.harness.engine.attention import AttentionSpec
from kvarena.harness.engine.query_statistics import QueryStatistics
from kvarena.harness.engine.recent_queries import RecentQueries

_POSITION_BITS = 32
_NEWEST = torch.iinfo(torch.int32).max  # comes after every position


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is attended to and scored at once: so many slots and KV heads that share T.

    slots: within ``cache``; heads: which KV heads of the layer they are.
    """

    cache: "LayerCache"
    slots: slice
    heads: slice


class LayerCache:
    """Buffers of one layer, allocated at the first append, when shapes and dtype are known.

    counts: by slot, how many tokens each KV head holds (nothing before the first append). Here
    they are equal among the heads of a slot, and among slots that are handled together.
    keys, values: [num_slots, K, capacity, D]; positions: [num_slots, K, capacity] int32;
    columns: one float32 [num_slots, K, capacity] per name; sink_keys: [num_slots, K, num_saved, D],
    the keys of the first tokens as they were written, for policies that re-rotate them; queries:
    the last ones, for policies that look back over steps, or None; statistics: of all of them, for
    policies that expect later ones, or None.
    """

    def __init__(
        self,
        num_slots: int,
        capacity_tokens: int,
        column_names: Sequence[str] = (),
        num_saved_sinks: int = 0,
        num_queries: int = 0,
        statistics: QueryStatistics | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.capacity_tokens = capacity_tokens
        self.num_saved_sinks = num_saved_sinks
        self.queries = RecentQueries(num_slots, num_queries) if num_queries else None
        self.statistics = statistics
        self.counts: list[list[int]] = [[] for _ in range(num_slots)]
        self._in_pass: list[int] = [0] * num_slots  # tokens of a head before the last eviction
        self._column_names = tuple(column_names)
        self._buffers: dict[str, Tensor] = {}

    @property
    def keys(self) -> Tensor:
        return self._buffers["keys"]

    @property
    def values(self) -> Tensor:
        return self._buffers["values"]

    @property
    def positions(self) -> Tensor:
        return self._buffers["positions"]

    @property
    def sink_keys(self) -> Tensor:
        return self._buffers["sink_keys"]

    def tokens(self, slots: slice, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [S, K, T, D] of the first T places, writable."""
        return self.keys[slots, :, :num_tokens], self.values[slots, :, :num_tokens]

    def parts(self, slots: slice) -> list[Part]:
        """All heads of the slots together, for they hold equally many tokens."""
        return [Part(cache=self, slots=slots, heads=slice(0, self.positions.shape[1]))]

    def held_tokens(self, slot: int) -> list[int]:
        """Of each KV head; nothing before the first append."""
        return self.counts[slot]

    def num_tokens(self, slots: slice) -> int:
        """T: what every head of these slots holds."""
        return self._common_count(slots)

    def held_positions(self, slot: int) -> Tensor:
        """[K, T] int64 in ascending order."""
        num_tokens = self._common_count(slice(slot, slot + 1))
        return self.positions[slot, :, :num_tokens].long().sort(dim=-1).values

    def columns(self, slots: slice, num_tokens: int) -> dict[str, Tensor]:
        """Writable views [S, K, T] of the per-token columns."""
        return {
            name: self._buffers["column:" + name][slots, :, :num_tokens]
            for name in self._column_names
        }

    def clear(self, slot: int) -> None:
        """Make room for another request: nothing of the one before it counts any more."""
        self.counts[slot] = [0] * len(self.counts[slot])
        if self.queries is not None:
            self.queries.clear(slot)
        if self.statistics is not None:
            self.statistics.clear(slot)

    def copy_slot(self, source: int, target: int, origin: "LayerCache | None" = None) -> None:
        """Have slot ``target`` hold what ``source`` holds, in places of its own.

        origin: the store of ``source``, if it is another one, as wide as this one.
        """
        origin = origin or self
        if not self._buffers:
            self._buffers = {name: torch.empty_like(one) for name, one in origin._buffers.items()}
        for name, buffer in self._buffers.items():
            filled = slice(0, origin._num_filled(name, source))
            buffer[target, :, filled] = origin._buffers[name][source, :, filled]
        self.counts[target] = list(origin.counts[source])
        self._in_pass[target] = origin._in_pass[source]
        if self.queries is not None:
            assert origin.queries is not None, "stores of one layer remember alike"
            self.queries.copy_slot(source, target, origin.queries)
        if self.statistics is not None:
            assert origin.statistics is not None, "stores of one layer observe alike"
            self.statistics.copy_slot(source, target, origin.statistics)

    def _num_filled(self, name: str, slot: int) -> int:
        """How many entries of a buffer count for a slot."""
        return self.num_saved_sinks if name == "sink_keys" else max(self.counts[slot])

    def append(
        self,
        slots: slice,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        queries: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        projected: Tensor | None = None,
    ) -> None:
        """Write Q new tokens per slot behind those it holds.

        keys, values: [S, K, Q, D]; positions: [S, Q] in the original text; queries: [S, H, Q, D]
        post-RoPE, if a pass brought the tokens; columns: [S, K, Q] where tokens do not start at 0;
        projected: the queries before rotary positions, for statistics.
        """
        if not self._buffers:
            self._allocate(keys, values)
        start = self._common_count(slots)
        end = start + keys.shape[2]
        assert end <= self.capacity_tokens, f"{end} tokens in {self.capacity_tokens} places"
        self._write(slots, start, keys, values)
        self.positions[slots, :, start:end] = positions[:, None]
        for name, column in self.columns(slots, end).items():
            column[:, :, start:] = 0 if columns is None or name not in columns else columns[name]
        if self.queries is not None and queries is not None:
            self.queries.observe(slots, queries, positions)
        if self.statistics is not None and projected is not None:
            self.statistics.observe(slots, projected, positions)
        if start < self.num_saved_sinks:
            saved_end = min(end, self.num_saved_sinks)
            self.sink_keys[slots, :, start:saved_end] = keys[:, :, : saved_end - start]
        self._count(slots, end)
        self._note_pass(slots, end)

    def _note_pass(self, slots: slice, num_tokens: int) -> None:
        """Remember what a head holds with the new tokens, before anything is evicted."""
        for slot in range(slots.start, slots.stop):
            self._in_pass[slot] = num_tokens

    def _common_count(self, slots: slice) -> int:
        """What every head of these slots holds, as cohorts see to it."""
        held = {count for heads in self.counts[slots] for count in heads}
        assert len(held) == 1, f"heads of slots {slots} hold {sorted(held)} tokens"
        return held.pop()

    def _count(self, slots: slice, num_tokens: int) -> None:
        num_heads = self.positions.shape[1]
        for slot in range(slots.start, slots.stop):
            self.counts[slot] = [num_tokens] * num_heads

    def _write(self, slots: slice, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values of the new tokens; see ``append``."""
        end = start + keys.shape[2]
        self.keys[slots, :, start:end] = keys
        self.values[slots, :, start:end] = values

    def evict(self, slots: slice, scores: Tensor, num_kept: int) -> None:
        """Keep the ``num_kept`` best of T tokens per head, in places [0, num_kept).

        scores: [S, K, T] float. Equal scores: the newer token stays. Survivors among the last E
        places move into the places of evicted tokens; all others stay where they are.
        """
        self._count(slots, num_kept)
        num_tokens = scores.shape[-1]
        num_evicted = num_tokens - num_kept
        positions = self.positions[slots, :, :num_tokens]
        if num_evicted == 1:
            is_better = scores > scores.amin(dim=-1, keepdim=True)
            dropped = positions.masked_fill(is_better, _NEWEST).argmin(dim=-1, keepdim=True)
        else:
            ranking = total_order(scores, positions)
            dropped = ranking.topk(num_evicted, largest=False, sorted=False).indices
            dropped = dropped.sort(dim=-1).values  # [S, K, E], holes before num_kept come first
        survivors = self._survivors(dropped, num_kept, num_evicted)
        first_rows, buffers = self._rows
        source = (first_rows[slots] + survivors).flatten()
        target = (first_rows[slots] + dropped).flatten()
        for buffer in buffers:
            move_rows(buffer, source, target)

    @staticmethod
    def _survivors(dropped: Tensor, num_kept: int, num_evicted: int) -> Tensor:
        """[S, K, E]: for each dropped place, the place whose token moves there (itself: none)."""
        if num_evicted == 1:
            return torch.full_like(dropped, num_kept)
        num_tokens = num_kept + num_evicted
        is_dropped = torch.zeros(
            (*dropped.shape[:2], num_tokens), dtype=torch.int8, device=dropped.device
        ).scatter_(-1, dropped, 1)
        survivors_first = is_dropped[..., num_kept:].argsort(dim=-1, stable=True) + num_kept
        # A head has as many holes before num_kept as survivors behind it, and both lists start with
        # them; what remains are dropped places behind num_kept, which nothing has to fill.
        return torch.where(dropped < num_kept, survivors_first, dropped)

    @cached_property
    def _rows(self) -> tuple[Tensor, list[Tensor]]:
        """The first row of each slot and head, [num_slots, K, 1], in the buffers as rows of places.

        Made once: a decode step comes here for every layer.
        """
        num_slots, num_heads, capacity = self.positions.shape
        heads = torch.arange(num_slots * num_heads, device=self.positions.device)
        first_rows = (heads * capacity).view(num_slots, num_heads, 1)
        return first_rows, [buffer.flatten(0, 2) for buffer in self._token_buffers()]

    def _token_buffers(self) -> list[Tensor]:
        """All buffers with one entry per place."""
        return [buffer for name, buffer in self._buffers.items() if name != "sink_keys"]

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        places = (self.num_slots, keys.shape[1], self.capacity_tokens)
        self._buffers["keys"] = keys.new_empty(*places, keys.shape[-1])
        self._buffers["values"] = values.new_empty(*places, values.shape[-1])
        self._allocate_side_state(keys)

    def _allocate_side_state(self, keys: Tensor) -> None:
        heads = (self.num_slots, keys.shape[1])
        self.counts = [[0] * keys.shape[1] for _ in range(self.num_slots)]
        places = (*heads, self.capacity_tokens)
        self._buffers["positions"] = torch.empty(places, dtype=torch.int32, device=keys.device)
        for name in self._column_names:
            self._buffers["column:" + name] = torch.empty(
                places, dtype=torch.float32, device=keys.device
            )
        if self.num_saved_sinks:
            self._buffers["sink_keys"] = keys.new_empty(
                *heads, self.num_saved_sinks, keys.shape[-1]
            )

    def resize(self, capacity_tokens: int) -> None:
        """Have so many places from now on; what each head holds stays where it is."""
        self.capacity_tokens = capacity_tokens
        for name in self._buffers.keys() - {"sink_keys"}:
            self._resize_buffer(name, self._places_of(name))
        self.__dict__.pop("_rows", None)  # made of the buffers of before

    def _places_of(self, name: str) -> int:
        """How many tokens of a head a buffer has room for."""
        return self.capacity_tokens

    def _resize_buffer(self, name: str, num_places: int) -> None:
        before = self._buffers[name]
        num_copied = min(num_places, before.shape[2])
        after = before.new_empty(*before.shape[:2], num_places, *before.shape[3:])
        after[:, :, :num_copied] = before[:, :, :num_copied]
        self._buffers[name] = after

    def attend(self, slots: slice, query: Tensor, spec: AttentionSpec) -> Tensor | None:
        """Output [S, H, 1, D] of one query per slot where no token needs to be read out for it.

        None: there is nothing better than ``tokens`` and a kernel.
        """
        return None

    def settle(self, slots: slice, queries: Tensor, positions: Tensor, spec: AttentionSpec) -> None:
        """Called when a pass is done with the layer; tokens that stay as they are need nothing."""

    @property
    def is_allocated(self) -> bool:
        return bool(self._buffers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers of this layer, all slots."""
        queries = 0 if self.queries is None else self.queries.nbytes
        queries += 0 if self.statistics is None else self.statistics.nbytes
        return queries + sum(buffer.nbytes for buffer in self._buffers.values())

    def bytes_in_pass(self, slot: int) -> int:
        """Bytes that a slot held during its last pass, before it evicted."""
        per_place, saved = self._bytes_per_slot
        return self._in_pass[slot] * len(self.counts[slot]) * per_place + saved

    def workspace_bytes(self, slot: int) -> int:
        """Further bytes of a slot while the layer is at work: none, attention reads the store."""
        return 0

    def held_bytes(self, slot: int) -> int:
        """Bytes that the live tokens of a slot occupy, side state included."""
        per_place, saved = self._bytes_per_slot
        return sum(self.counts[slot]) * per_place + saved

    @cached_property
    def _bytes_per_slot(self) -> tuple[int, int]:
        """Of each place of a head, and of all heads besides; asked for after every pass."""
        num_places = self.positions.numel()
        per_place = sum(buffer.nbytes // num_places for buffer in self._token_buffers())
        return per_place, self._saved_bytes

    @property
    def _saved_bytes(self) -> int:
        """What a slot holds besides its tokens: first keys, last queries, statistics of all."""
        statistics = 0 if self.statistics is None else self.statistics.slot_nbytes
        sinks = self.sink_keys.nbytes // self.num_slots if self.num_saved_sinks else 0
        return sinks + statistics + (0 if self.queries is None else self.queries.slot_nbytes)


def head_slice(kv_heads: slice, group: int) -> slice:
    """The query heads that share these KV heads, ``group`` to each."""
    return slice(kv_heads.start * group, kv_heads.stop * group)


def total_order(scores: Tensor, positions: Tensor) -> Tensor:
    """[S, K, T] int64 that sorts by score, then by position, with no two equal in a head.

    A float's bits sort like the float once the lower bits of negative ones are flipped, so the
    score fits above the position in one integer, and ties are settled the same on any device.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    sortable = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (sortable.long() << _POSITION_BITS) | positions.long()


def move_rows(rows: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy rows ``source`` to rows ``target`` ([S * K * E] each) of a buffer's places.

    Whole rows at a time, which takes a fifth of the time of gather and scatter on a CPU.
    """
    rows.index_copy_(0, target, rows.index_select(0, source))
