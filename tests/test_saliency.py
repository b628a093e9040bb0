"""Probe queries: which are kept, and the attention they give."""

import math

import pytest
import torch

from kvarena.codecs.base import Probes
from kvarena.harness.engine.attention import AttentionSpec
from kvarena.harness.engine.probe_queries import ProbeStore

H, K, D = 4, 2, 8
SPEC = AttentionSpec(scaling=D**-0.5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def store_after(queries: torch.Tensor, chunk: int, probes: Probes) -> ProbeStore:
    store = ProbeStore(probes)
    for start in range(0, queries.shape[1], chunk):
        end = min(start + chunk, queries.shape[1])
        store.observe(queries[:, start:end], torch.arange(start, end))
    return store


@pytest.mark.parametrize("chunk", [1, 7, 64, 400])
def test_the_probes_are_the_newest_and_some_others_for_any_chunk(chunk: int) -> None:
    queries = random(H, 400, D)
    kept = store_after(queries, chunk, Probes(recent=0.05, random=0.1, count="probes"))
    positions = kept._positions.tolist()
    assert positions == sorted(set(positions))
    assert positions[-20:] == list(range(380, 400))
    drawn = [position for position in positions if position < 380]
    assert 0.07 < len(drawn) / 380 < 0.13
    halves = [sum(low <= position < low + 190 for position in drawn) for low in (0, 190)]
    assert min(halves) > 0.35 * len(drawn)
    assert torch.equal(kept._queries, queries[:, positions])
    once = store_after(queries, 400, Probes(recent=0.05, random=0.1, count="probes"))
    assert torch.equal(kept._positions, once._positions)


def by_hand(
    queries: torch.Tensor, probes: list[int], keys: torch.Tensor, places: torch.Tensor, count: str
) -> torch.Tensor:
    """Every probe and head in turn, in plain Python."""
    mass = torch.zeros(K, keys.shape[1], dtype=torch.float64)
    seen = torch.zeros(K, keys.shape[1], dtype=torch.float64)
    for probe in probes:
        for head in range(H):
            group = head // (H // K)
            visible = [t for t in range(keys.shape[1]) if places[group, t] <= probe]
            if not visible:
                continue
            logits = [float(queries[head, probe] @ keys[group, t]) / math.sqrt(D) for t in visible]
            total = sum(math.exp(logit) for logit in logits)
            for t, logit in zip(visible, logits, strict=True):
                mass[group, t] += math.exp(logit) / total
                seen[group, t] += head % (H // K) == 0
    if count == "text":
        return mass / (queries.shape[1] - places)
    return mass / seen.clamp(min=1)


@pytest.mark.parametrize("count", ["probes", "text"])
def test_saliency_is_attention_per_query_that_could_see_the_key(count: str) -> None:
    queries, keys = random(H, 60, D), random(K, 30, D, seed=1)
    # Each head kept other tokens; one kept none that the first probe could see.
    places = torch.stack([torch.arange(0, 60, 2), torch.arange(30, 60)])
    store = store_after(queries, 16, Probes(recent=0.1, random=0.2, count=count))
    expected = by_hand(queries, store._positions.tolist(), keys, places, count)
    assert int(store._positions[0]) < 30
    torch.testing.assert_close(store.saliency(keys, places, SPEC), expected)


def test_a_sliding_window_hides_what_is_too_far_back() -> None:
    queries, keys = random(H, 40, D), random(K, 40, D, seed=1)
    store = store_after(queries, 8, Probes(recent=0.05, random=0.0, count="probes"))
    spec = AttentionSpec(scaling=D**-0.5, sliding_window=10)
    saliency = store.saliency(keys, torch.arange(40).expand(K, 40), spec)
    assert torch.all(saliency[:, :29] == 0)
    assert torch.all(saliency[:, 30:] > 0)


def test_bytes_are_those_of_queries_and_positions() -> None:
    store = ProbeStore(Probes(recent=0.5, random=0.0, count="probes"))
    assert store.nbytes == 0
    store.observe(random(H, 10, D).half(), torch.arange(10))
    assert store.nbytes == 5 * (H * D * 2 + 4)
