"""Eviction in place: what stays, where it goes, and who wins a tie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarena.harness.engine.layer_cache import LayerCache

K, D = 2, 4


def filled(num_tokens: int, num_slots: int = 2, seed: int = 0) -> LayerCache:
    """A cache whose keys, values and column all spell out the token's position and head."""
    cache = LayerCache(num_slots, num_tokens + 3, ("mark",))
    positions = torch.arange(num_tokens).expand(num_slots, -1)
    heads = torch.arange(K)[None, :, None, None] * 1000
    keys = (positions[:, None, :, None] + heads).expand(-1, K, -1, D).float()
    cache.append(slice(0, num_slots), keys, -keys, positions)
    cache.columns(slice(0, num_slots), num_tokens)["mark"].copy_(keys[..., 0])
    return cache


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(2, 60),
    share=st.floats(0.02, 0.98),
    seed=st.integers(0, 1000),
    levels=st.integers(1, 6),
)
def test_the_best_stay_and_everything_moves_with_its_token(
    num_tokens: int, share: float, seed: int, levels: int
) -> None:
    num_kept = min(num_tokens - 1, max(1, round(share * num_tokens)))
    generator = torch.Generator().manual_seed(seed)
    # Few levels, so that there are ties.
    scores = torch.randint(0, levels, (2, K, num_tokens), generator=generator).float()
    cache = filled(num_tokens)
    cache.evict(slice(0, 2), scores, num_kept)
    for slot in range(2):
        for head in range(K):
            by_score_then_age = sorted(
                range(num_tokens), key=lambda i: (scores[slot, head, i].item(), i)
            )
            expected = sorted(by_score_then_age[-num_kept:])
            kept = cache.positions[slot, head, :num_kept]
            assert sorted(kept.tolist()) == expected
            keys = cache.keys[slot, head, :num_kept]
            assert torch.equal(keys, (kept + 1000 * head)[:, None].expand(-1, D).float())
            assert torch.equal(cache.values[slot, head, :num_kept], -keys)
            mark = cache.columns(slice(slot, slot + 1), num_kept)["mark"][0, head]
            assert torch.equal(mark, keys[:, 0])


def test_survivors_before_the_tail_do_not_move() -> None:
    cache = filled(10)
    scores = torch.arange(10.0).expand(2, K, 10).clone()
    scores[..., 0] = 99
    cache.evict(slice(0, 2), scores, 8)  # drops 1 and 2, so 8 and 9 fill their places
    assert cache.positions[0, 0, 0] == 0
    assert cache.positions[0, 0, 3:8].tolist() == [3, 4, 5, 6, 7]
    assert sorted(cache.positions[0, 0, 1:3].tolist()) == [8, 9]


@pytest.mark.parametrize("num_kept", [9, 6])
def test_protected_tokens_never_lose_a_tie(num_kept: int) -> None:
    cache = filled(10)
    scores = torch.full((2, K, 10), torch.finfo(torch.float32).max)
    scores[..., :2] = float("inf")  # protected, and the oldest
    cache.evict(slice(0, 2), scores, num_kept)
    assert {0, 1} <= set(cache.positions[0, 0, :num_kept].tolist())


@pytest.mark.parametrize("num_evicted", [1, 3])
def test_the_oldest_loses_a_tie_wherever_it_is_stored(num_evicted: int) -> None:
    cache = filled(10)
    cache.evict(slice(0, 2), torch.arange(10.0).expand(2, K, 10), 8)
    assert cache.positions[0, 0, :2].tolist() == [8, 9]  # the newest now stand first
    cache.evict(slice(0, 2), torch.zeros(2, K, 8), 8 - num_evicted)
    kept = cache.positions[:, :, : 8 - num_evicted].sort(dim=-1).values
    assert torch.equal(kept, torch.arange(2 + num_evicted, 10).expand_as(kept).int())


def test_negative_zero_ties_with_zero() -> None:
    cache = filled(3)
    cache.evict(slice(0, 2), torch.tensor([0.0, -0.0, 0.0]).expand(2, K, 3), 2)
    assert sorted(cache.positions[0, 0, :2].tolist()) == [1, 2]


def test_only_the_named_slots_change() -> None:
    cache = filled(6)
    before = cache.keys[1].clone()
    cache.evict(slice(0, 1), torch.arange(6.0).flip(0).expand(1, K, 6), 3)
    assert torch.equal(cache.keys[1], before)


def test_more_tokens_than_places_is_refused() -> None:
    cache = filled(6)
    keys = torch.zeros(2, K, 4, D)
    with pytest.raises(AssertionError, match="10 tokens in 9 places"):
        cache.append(slice(0, 2), keys, keys, torch.zeros(2, 4, dtype=torch.long))


def test_held_bytes_count_every_buffer() -> None:
    cache = filled(6)
    per_token = K * (2 * D * 4 + 4 + 4)  # keys, values, position, column
    assert cache.held_bytes(0) == 6 * per_token
    cache.evict(slice(0, 1), torch.zeros(1, K, 6), 5)
    assert cache.counts == [[5] * K, [6] * K]
    assert (cache.held_bytes(0), cache.bytes_in_pass(0)) == (5 * per_token, 6 * per_token)
    cache.clear(0)
    assert (cache.held_bytes(0), cache.held_bytes(1)) == (0, 6 * per_token)
    assert cache.allocated_bytes == 2 * 9 * per_token
