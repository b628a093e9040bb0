"""The KV store of one layer whose heads hold different numbers of tokens.

Every head of every slot is a store of its own, as wide as it needs: what a head gains in places
another one gives up, so that all heads that share a budget never have more places together than
under an even one. Places move between passes, a head at a time, when some head would run out.

Shape letters as in layer_cache.py; B most tokens of a pass.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kvarena.harness.engine.attention import AttentionSpec
from kvarena.harness.engine.layer_cache import LayerCache, Part, head_slice


class RaggedCache:
    """Speaks for a slot's heads together; see LayerCache for what each call means.

    new_head: makes the store of one head of one slot, N + B places wide.
    """

    def __init__(self, num_slots: int, new_head: Callable[[], LayerCache]) -> None:
        self._new_head = new_head
        self._heads: list[list[LayerCache]] = [[] for _ in range(num_slots)]

    def heads(self, slot: int) -> Sequence[LayerCache]:
        """The stores of a slot's KV heads; none before its first token."""
        return self._heads[slot]

    def held_tokens(self, slot: int) -> list[int]:
        return [head.counts[0][0] for head in self._heads[slot]]

    def parts(self, slots: slice) -> list[Part]:
        """Each head of the one slot by itself."""
        return [
            Part(cache=head, slots=slice(0, 1), heads=slice(index, index + 1))
            for index, head in enumerate(self._heads[_only(slots)])
        ]

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
        """keys, values [S, K, Q, D]; positions [S, Q]; columns [S, K, Q]; queries and projected

        [S, H, Q, D].
        """
        for row, slot in enumerate(range(slots.start, slots.stop)):
            if not self._heads[slot]:
                self._heads[slot] = [self._new_head() for _ in range(keys.shape[1])]
            one = slice(row, row + 1)
            for index, head in enumerate(self._heads[slot]):
                own = slice(index, index + 1)
                group = head_slice(own, 0 if queries is None else queries.shape[1] // keys.shape[1])
                head.append(
                    slice(0, 1),
                    keys[one, own],
                    values[one, own],
                    positions[one],
                    None if queries is None else queries[one, group],
                    {name: column[one, own] for name, column in (columns or {}).items()},
                    None if projected is None else projected[one, group],
                )

    def copy_slot(self, source: int, target: int) -> None:
        """Have slot ``target`` hold what ``source`` holds, in stores of its own."""
        copies = []
        for head in self._heads[source]:
            copy = self._new_head()
            copy.capacity_tokens = head.capacity_tokens
            copy.copy_slot(0, 0, origin=head)
            copies.append(copy)
        self._heads[target] = copies

    def settle(self, slots: slice, queries: Tensor, positions: Tensor, spec: AttentionSpec) -> None:
        heads = self._heads[_only(slots)]
        for index, head in enumerate(heads):
            own = head_slice(slice(index, index + 1), queries.shape[1] // len(heads))
            head.settle(slice(0, 1), queries[:, own], positions, spec.of_heads(own))

    def clear(self, slot: int) -> None:
        for head in self._heads[slot]:
            head.clear(0)

    def held_positions(self, slot: int) -> list[Tensor]:
        """Of each head, [T] int64 in ascending order."""
        return [head.held_positions(0)[0] for head in self._heads[slot]]

    @property
    def is_allocated(self) -> bool:
        return any(self._heads)

    @property
    def allocated_bytes(self) -> int:
        return sum(head.allocated_bytes for heads in self._heads for head in heads)

    def held_bytes(self, slot: int) -> int:
        return sum(head.held_bytes(0) for head in self._heads[slot])

    def bytes_in_pass(self, slot: int) -> int:
        return sum(head.bytes_in_pass(0) for head in self._heads[slot])

    def workspace_bytes(self, slot: int) -> int:
        return max(head.workspace_bytes(0) for head in self._heads[slot])


def make_room(heads: Sequence[LayerCache], num_new: int, mean_places: int) -> None:
    """Give every head room for so many new tokens, and all of them ``mean_places`` on average.

    Nothing is done while there is room, which is so for most steps of decoding. Heads that become
    smaller go first; for a moment there are two copies of one head.
    """
    counts = [head.counts[0][0] for head in heads]
    if all(
        count + num_new <= head.capacity_tokens for head, count in zip(heads, counts, strict=True)
    ):
        return
    spare = mean_places - -(-sum(counts) // len(heads))
    assert spare >= num_new, f"{spare} free places per head for {num_new} new tokens"
    wanted = [count + spare for count in counts]
    order = sorted(range(len(heads)), key=lambda i: wanted[i] - heads[i].capacity_tokens)
    for index in order:
        heads[index].resize(wanted[index])


def _only(slots: slice) -> int:
    assert slots.stop - slots.start == 1, "slots with heads of their own are handled one by one"
    return int(slots.start)
