"""The KV store of one layer under a codec: an exact window of newest tokens, older ones coded.

Between passes only the blocks' packed bytes and the exact window are held. For attention one layer
at a time is decoded into a workspace, which is gone when the layer is done. In each head the tokens
stand in the order of the text: first what its blocks hold, then the exact ones; positions and
columns keep the same order. Eviction comes before coding, a block is coded once: a token evicted
from it is struck off its map of live rows, and a block with too many gaps is packed anew from
its codes.

Shape letters as in layer_cache.py; M heads that code a block together, R rows of a block.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarena.codecs.base import Codec, merge
from kvarena.harness.engine.attention import AttentionSpec
from kvarena.harness.engine.coded_blocks import (
    Segment,
    are_alike,
    live_map,
    live_rows,
    parts,
    struck,
)
from kvarena.harness.engine.layer_cache import LayerCache, move_rows, total_order
from kvarena.harness.engine.probe_queries import ProbeStore
from kvarena.harness.engine.query_statistics import QueryStatistics

# Share of a block's rows alive. 1024 tokens of SmolLM2 under KeyDiff and 4-bit KIVI take 13.5 MB
# with 0.5, 11.6 MB in a seventh more time with 0.9, 11.4 MB with 1.
_REPACK_BELOW = 0.9


class Workspace:
    """Where layers are decoded, one at a time, all of a job into the same two buffers.

    A new buffer for each pass would be a little larger than the last one's, with small blocks that
    stay between them: the process would keep several times what is in use.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def views(self, shapes: Sequence[Sequence[int]], slots: slice, like: Tensor) -> list[Tensor]:
        """Keys and values [S, K, capacity, D] of some slots, to be filled.

        shapes: of the two for all slots; like: a tensor of their data type, on their device.
        """
        sizes = [prod(shape) for shape in shapes]
        if any(len(buffer) < size for buffer, size in zip(self._buffers, sizes, strict=True)):
            self._buffers = [like.new_empty(0)] * 2  # let go first
            self._buffers = [like.new_empty(size) for size in sizes]
        return [
            buffer[:size].view(*shape)[slots]
            for buffer, size, shape in zip(self._buffers, sizes, shapes, strict=True)
        ]


class CodedCache(LayerCache):
    """A LayerCache whose older tokens are coded. Buffers ``keys`` and ``values`` hold exact tokens.

    chunk_tokens: most tokens of a pass; exact_dtype: of exact tokens, None for the model's own;
    workspace: of all layers of the job.
    """

    def __init__(
        self,
        num_slots: int,
        capacity_tokens: int,
        codec: Codec,
        chunk_tokens: int,
        exact_dtype: torch.dtype | None,
        workspace: Workspace,
        column_names: Sequence[str] = (),
        num_saved_sinks: int = 0,
        num_queries: int = 0,
        statistics: QueryStatistics | None = None,
    ) -> None:
        super().__init__(
            num_slots, capacity_tokens, column_names, num_saved_sinks, num_queries, statistics
        )
        self.codec = codec
        self._exact_dtype = exact_dtype
        self._dtype: torch.dtype  # the model's own, known with the first tokens
        self._workspace = workspace
        self._most_exact = codec.window + codec.block - 1 + chunk_tokens
        self._segments: list[list[Segment]] = [[] for _ in range(num_slots)]
        self._num_exact: list[list[int]] = [[] for _ in range(num_slots)]  # of each head
        self._bytes_in_pass = [0] * num_slots
        self._is_decoded = [False] * num_slots  # in the slot's last pass
        self._probes: list[ProbeStore | None] = [None] * num_slots

    @property
    def _exact_places(self) -> int:
        if not self.codec.codes:
            return self.capacity_tokens
        return min(self.capacity_tokens, self._most_exact)

    def _places_of(self, name: str) -> int:
        return self._exact_places if name in ("keys", "values") else self.capacity_tokens

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self._segments[slot] = []
        self._num_exact[slot] = [0] * len(self.counts[slot])
        self._probes[slot] = ProbeStore(self.codec.probes) if self.codec.probes else None

    def copy_slot(self, source: int, target: int, origin: LayerCache | None = None) -> None:
        origin = origin or self
        assert isinstance(origin, CodedCache), "stores of one layer code alike"
        self._dtype = origin._dtype  # with the buffers, if they are not there yet
        super().copy_slot(source, target, origin)
        # A block is never written to again, so slots may share it; each has its own list of them.
        self._segments[target] = list(origin._segments[source])
        self._num_exact[target] = list(origin._num_exact[source])
        self._bytes_in_pass[target] = origin._bytes_in_pass[source]
        self._probes[target] = copy(origin._probes[source])

    def _num_filled(self, name: str, slot: int) -> int:
        if name in ("keys", "values"):
            return max(self._num_exact[slot])
        return super()._num_filled(name, slot)

    def _note_pass(self, slots: slice, num_tokens: int) -> None:
        super()._note_pass(slots, num_tokens)
        for slot in range(slots.start, slots.stop):
            self._bytes_in_pass[slot] = self.held_bytes(slot)
            self._is_decoded[slot] = False

    def _write(self, slots: slice, start: int, keys: Tensor, values: Tensor) -> None:
        for row, slot in enumerate(range(slots.start, slots.stop)):
            for head, first in enumerate(self._num_exact[slot]):
                last = first + keys.shape[2]
                assert last <= self._exact_places, f"{last} tokens in {self._exact_places} places"
                self.keys[slot, head, first:last] = keys[row, head]
                self.values[slot, head, first:last] = values[row, head]
                self._num_exact[slot][head] = last

    def tokens(self, slots: slice, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [S, K, T, D] in the model's data type, until another layer is decoded."""
        heads = (self.num_slots, self.keys.shape[1], self.capacity_tokens)
        shapes = [(*heads, self.keys.shape[-1]), (*heads, self.values.shape[-1])]
        like = self.keys.new_empty(0, dtype=self._dtype)
        keys, values = self._workspace.views(shapes, slots, like)
        keys, values = keys[:, :, :num_tokens], values[:, :, :num_tokens]
        for row, slot in enumerate(range(slots.start, slots.stop)):
            self._is_decoded[slot] = True
            filled = self._decode(self._segments[slot], keys[row], values[row])
            for head, num_exact in enumerate(self._num_exact[slot]):
                end = filled[head] + num_exact
                assert end == num_tokens, f"head {head} holds {end} tokens, not {num_tokens}"
                keys[row, head, filled[head] : end] = self.keys[slot, head, :num_exact]
                values[row, head, filled[head] : end] = self.values[slot, head, :num_exact]
        return keys, values

    def attend(self, slots: slice, query: Tensor, spec: AttentionSpec) -> Tensor | None:
        """What the codec attends to as it is coded, merged with the exact tokens."""
        outputs = []
        for row, slot in enumerate(range(slots.start, slots.stop)):
            if not are_alike(self._segments[slot], len(self._num_exact[slot])):
                return None
            coded = self.codec.attend(
                query[row],
                [segment.block for segment in self._segments[slot]],
                live_map(self._segments[slot], query.device),
                spec.scaling,
            )
            if coded is None:
                return None
            exact = self._attend_exact(slot, query[row], spec)
            parts = [torch.stack(pair) for pair in zip(coded, exact, strict=True)]
            outputs.append(merge(parts[0], parts[1])[0].to(query.dtype))
        return torch.stack(outputs)

    def _attend_exact(self, slot: int, query: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Output [H, 1, D] and log-sum-exp [H, 1] over the exact tokens alone; query [H, 1, D]."""
        num_exact = torch.tensor(self._num_exact[slot], device=query.device)
        longest = max(self._num_exact[slot])
        keys, values = (buffer[slot, :, :longest].float() for buffer in (self.keys, self.values))
        grouped = query.float().view(len(num_exact), -1, query.shape[-1])  # [K, G, D]
        logits = grouped @ keys.transpose(-1, -2) * spec.scaling
        is_empty = torch.arange(longest, device=query.device) >= num_exact[:, None]
        logits = logits.masked_fill(is_empty[:, None], float("-inf"))
        output = logits.softmax(dim=-1) @ values
        return output.view(*query.shape[:2], -1), logits.logsumexp(dim=-1).view(query.shape[:2])

    def _decode(self, segments: Sequence[Segment], keys: Tensor, values: Tensor) -> list[int]:
        """Fill the first places of [K, T, D] with what the blocks hold; how many, per head."""
        filled = [0] * len(keys)
        for part in parts(segments):
            live = live_rows(part, len(keys))
            rows = torch.from_numpy(live.rows).to(keys.device).split(live.counts.tolist())
            coded = self.codec.decode([segment.block for segment in part])
            for target, source in zip((keys, values), coded, strict=True):
                source = source.to(target.dtype)
                for head, (first, own) in enumerate(zip(filled, rows, strict=True)):
                    torch.index_select(source, 0, own, out=target[head, first : first + len(own)])
            filled = [first + len(own) for first, own in zip(filled, rows, strict=True)]
        return filled

    def evict(self, slots: slice, scores: Tensor, num_kept: int) -> None:
        """Keep the ``num_kept`` best of T tokens per head, as LayerCache does, in text order."""
        self._count(slots, num_kept)
        num_tokens = scores.shape[-1]
        ranking = total_order(scores, self.positions[slots, :, :num_tokens])
        kept = ranking.topk(num_kept, sorted=False).indices.sort(dim=-1).values  # [S, K, num_kept]
        for buffer in self._side_buffers():
            buffer[slots, :, :num_kept] = buffer[slots].gather(2, kept)
        is_kept = torch.zeros_like(ranking, dtype=torch.bool).scatter_(-1, kept, True)
        for row, slot in enumerate(range(slots.start, slots.stop)):
            self._drop(slot, is_kept[row].cpu().numpy())

    def _drop(self, slot: int, is_kept: NDArray[np.bool_]) -> None:
        """Strike the tokens that ``is_kept`` [K, T] leaves out."""
        num_heads, num_tokens = is_kept.shape
        num_coded = num_tokens - np.array(self._num_exact[slot])
        is_coded = np.arange(num_tokens) < num_coded[:, None]
        fates = is_kept[is_coded]
        if not fates.all():
            held = self._segments[slot]
            after = struck(held, fates, num_heads)
            self._segments[slot] = [
                new if new is old else self._repacked(new)
                for old, new in zip(held, after, strict=True)
                if any(new.counts)
            ]
        # What stays of a head's exact tokens moves up, in order.
        is_exact = is_kept & ~is_coded
        num_left = is_exact.sum(axis=1)
        self._num_exact[slot] = num_left.tolist()
        heads, tokens = is_exact.nonzero()
        source = tokens - num_coded[heads]
        target = np.arange(len(heads)) - (num_left.cumsum() - num_left)[heads]
        moved = source != target
        first_rows = (slot * num_heads + heads[moved]) * self.keys.shape[2]
        rows_from, rows_to = (
            torch.from_numpy(first_rows + places[moved]).to(self.keys.device)
            for places in (source, target)
        )
        for buffer in (self.keys, self.values):
            move_rows(buffer.flatten(0, 2), rows_from, rows_to)

    def _repacked(self, segment: Segment) -> Segment:
        """The segment without its dead rows, if there are enough of them in every head."""
        num_rows = max(segment.counts)
        if not 0 < num_rows <= _REPACK_BELOW * segment.block.num_rows:
            return segment
        # Live rows first, in order. A head with fewer of them than another fills up with dead ones.
        alive = segment.rows
        order = np.argsort(~alive, axis=1, kind="stable")[:, :num_rows]
        alive = np.take_along_axis(alive, order, axis=1)
        rows = torch.from_numpy(order).to(self.keys.device)
        return replace(segment, block=self.codec.take(segment.block, rows)).only(alive)

    def settle(self, slots: slice, queries: Tensor, positions: Tensor, spec: AttentionSpec) -> None:
        """Code what has aged out of the exact window; called when a pass is done with the layer.

        queries: [S, H, Q, D] of this pass; positions: [S, Q].
        """
        if not self.codec.codes:
            return
        num_tokens = self._common_count(slots)
        for row, slot in enumerate(range(slots.start, slots.stop)):
            probes = self._probes[slot]
            if probes is not None:
                probes.observe(queries[row].to(self.keys.dtype), positions[row])
            num_exact = self._num_exact[slot]
            num_blocks = [max(0, n - self.codec.window) // self.codec.block for n in num_exact]
            if not any(num_blocks):
                continue
            saliency = None
            if probes is not None:
                keys, _ = self.tokens(slice(slot, slot + 1), num_tokens)
                places = self.positions[slot, :, :num_tokens]
                wanted = slice(num_tokens - max(num_exact), num_tokens - self.codec.window)
                saliency = probes.saliency(keys[0], places, spec, wanted)
            self._encode(slot, num_blocks, saliency)

    def _encode(self, slot: int, num_blocks: Sequence[int], saliency: Tensor | None) -> None:
        """Code the oldest blocks of exact tokens.

        saliency: None or [K, W], from the first token on that is exact in any head.
        """
        size, num_exact = self.codec.block, self._num_exact[slot]
        for turn in range(max(num_blocks)):
            heads = [head for head, num in enumerate(num_blocks) if num > turn]
            first, last = turn * size, (turn + 1) * size
            weights = None
            if saliency is not None:
                starts = [max(num_exact) - num_exact[head] + first for head in heads]
                weights = torch.stack(
                    [saliency[head, at : at + size] for head, at in zip(heads, starts, strict=True)]
                )
            block = self.codec.encode(
                self.keys[slot, heads, first:last], self.values[slot, heads, first:last], weights
            )
            self._segments[slot].append(
                Segment(
                    heads=tuple(heads),
                    block=block,
                    live=np.packbits(np.ones((len(heads), size), dtype=bool), axis=1),
                    counts=(size,) * len(heads),
                )
            )
        for head, num in enumerate(num_blocks):
            left = num_exact[head] - num * size
            for buffer in (self.keys, self.values):
                aged = buffer[slot, head, num * size : num_exact[head]].clone()
                buffer[slot, head, :left] = aged
            num_exact[head] = left

    def held_bytes(self, slot: int) -> int:
        """Bytes that this slot's tokens really occupy, blocks, window and all side state."""
        coded = sum(segment.nbytes for segment in self._segments[slot])
        exact = sum(self._num_exact[slot]) * _row_bytes(self.keys, self.values)
        side = sum(self.counts[slot]) * sum(buffer.itemsize for buffer in self._side_buffers())
        probes = self._probes[slot]
        return (
            coded + exact + side + self._saved_bytes + (probes.nbytes if probes is not None else 0)
        )

    def bytes_in_pass(self, slot: int) -> int:
        return self._bytes_in_pass[slot]

    def workspace_bytes(self, slot: int) -> int:
        """Bytes of one slot's decoded keys and values, there while the layer is at work."""
        if not self._is_decoded[slot]:
            return 0
        width = self.keys.shape[-1] + self.values.shape[-1]
        return self._in_pass[slot] * self.keys.shape[1] * width * self._dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers and blocks of this layer, all slots."""
        coded = sum(segment.nbytes for segments in self._segments for segment in segments)
        probes = sum(store.nbytes for store in self._probes if store is not None)
        return super().allocated_bytes + coded + probes

    def _side_buffers(self) -> list[Tensor]:
        """Positions and columns: one entry per token, in the order of the tokens."""
        return [
            buffer
            for name, buffer in self._buffers.items()
            if name not in ("keys", "values", "sink_keys")
        ]

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        self._dtype = keys.dtype
        exact = self._exact_dtype or keys.dtype
        places = (self.num_slots, keys.shape[1], self._exact_places)
        self._buffers["keys"] = keys.new_empty(*places, keys.shape[-1], dtype=exact)
        self._buffers["values"] = values.new_empty(*places, values.shape[-1], dtype=exact)
        self._allocate_side_state(keys)
        for slot in range(self.num_slots):
            self.clear(slot)  # once more, now that the number of heads is known


def _row_bytes(keys: Tensor, values: Tensor) -> int:
    """Bytes of one exact token of one head."""
    return keys.shape[-1] * keys.itemsize + values.shape[-1] * values.itemsize
