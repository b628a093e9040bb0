"""The coded store: with a lossless codec it changes nothing; blocks are coded once and counted."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kvarena.codecs.base import Block
from kvarena.codecs.kivi import KIVI
from kvarena.harness.engine import Batch, Engine, Generation, coded_cache
from kvarena.harness.engine.coded_cache import CodedCache
from kvarena.harness.registry import build, choices, load_choice
from lossless import Lossless
from toys import finished, kernel_for, toy_model, toy_prompt

# One of each kind of side state; the store does not see what else a score is made of.
POLICIES = ["full", "h2o", "keydiff", "r_kv", "snapkv", "streaming_llm", "critical"]
CODECS = choices("codec")
PROMPTS = [toy_prompt(length, seed=length) for length in (200, 151, 97, 40)]
NEW_TOKENS = 40


def policy_named(name: str) -> object:
    return build(load_choice("policy", name))


def codec_named(name: str, **changes: object) -> object:
    return build(load_choice("codec", name) | changes)


def generate(
    policy_name: str,
    codec: object | None,
    *,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float64,
    slots: int = 2,
    budget: int = 64,
    kv_dtype: torch.dtype | None = None,
) -> tuple[Batch, list[Generation]]:
    engine = Engine(
        toy_model(architecture, dtype=dtype),
        policy_named(policy_name),
        codec=codec,
        kv_dtype=kv_dtype,
        budget_tokens=budget,
        chunk_tokens=24,
        slots=slots,
        attention=kernel_for(architecture),
    )
    batch = engine.batch(
        PROMPTS, max_new_tokens=NEW_TOKENS, record_history=True, record_logits="all"
    )
    return batch, finished(batch)


class AttendsCoded(KIVI):
    """KIVI with attention over its blocks by itself, in plain torch; notes how often."""

    calls = 0
    with_gaps = 0

    def attend(
        self, query: Tensor, blocks: Sequence[Block], live: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        type(self).calls += 1
        type(self).with_gaps += live is not None
        num_heads, num_rows = blocks[0].num_heads, blocks[0].num_rows
        keys, values = (
            part.unflatten(0, (len(blocks), num_heads, num_rows)).transpose(0, 1).flatten(1, 2)
            for part in self.decode(blocks)
        )
        logits = query.float().view(num_heads, -1, query.shape[-1]) @ keys.mT * scaling
        if live is not None:
            logits = logits.masked_fill(~live.transpose(0, 1).flatten(1)[:, None], -torch.inf)
        output = logits.softmax(dim=-1).nan_to_num() @ values
        return output.view_as(query), logits.logsumexp(dim=-1).view(query.shape[:2])


@pytest.mark.parametrize(
    ("policy_name", "shape", "attends"),
    [
        ("full", "uniform", True),
        ("keydiff", "uniform", True),
        ("keydiff", "ada", True),
        ("h2o", "uniform", False),
        ("streaming_llm", "uniform", False),
    ],
)
def test_a_step_over_blocks_that_stay_coded_gives_the_same_answer(
    policy_name: str, shape: str, attends: bool
) -> None:
    """Not where a pass needs keys or weights: when it evicts, and for policies that see mass."""

    def run(codec: KIVI, attention: str = "sdpa") -> tuple[Batch, list[Generation]]:
        engine = Engine(
            toy_model("llama", dtype=torch.float32),
            policy_named(policy_name),
            shape=build(load_choice("shape", shape)),
            codec=codec,
            budget_tokens=64,
            chunk_tokens=24,
            slots=2,
            evict_every=4,
            attention=attention,
        )
        batch = engine.batch(
            PROMPTS, max_new_tokens=NEW_TOKENS, record_history=True, record_logits="all"
        )
        return batch, finished(batch)

    AttendsCoded.calls = AttendsCoded.with_gaps = 0
    _, decoded = run(KIVI(window=16, block=8))
    _, fused = run(AttendsCoded(window=16, block=8))
    assert bool(AttendsCoded.calls) == attends
    if policy_name == "keydiff" and shape == "uniform":
        assert AttendsCoded.with_gaps  # heads that lose different tokens leave some
    if shape == "uniform":
        assert_same(fused, decoded, 1e-4)
    for left, right in zip(fused, decoded, strict=True):
        assert left.token_ids == right.token_ids
    assert any("triton" in one.kernels for one in fused) == attends
    AttendsCoded.calls = 0
    run(AttendsCoded(window=16, block=8), attention="reference")
    assert not AttendsCoded.calls, "the yardstick reads every token out"


def assert_same(one: list[Generation], other: list[Generation], tolerance: float) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.token_ids == right.token_ids
        for before, after in zip(left.kept_history, right.kept_history, strict=True):
            for kept, expected in zip(before.positions, after.positions, strict=True):
                assert torch.equal(kept, expected)
        assert (left.logits - right.logits).abs().max() < tolerance


@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_a_lossless_codec_keeps_the_same_tokens_and_answers(
    architecture: str, policy_name: str
) -> None:
    _, plain = generate(policy_name, None, architecture=architecture)
    codec = Lossless(window=16, block=8)
    batch, coded = generate(policy_name, codec, architecture=architecture)
    assert_same(coded, plain, 1e-9)
    assert any(layer._segments[0] for layer in batch.layers)


@pytest.mark.parametrize("window", [0, 5])
def test_any_window_and_block_give_the_same_answers(window: int) -> None:
    _, plain = generate("h2o", None)
    _, coded = generate("h2o", Lossless(window=window, block=3))
    assert_same(coded, plain, 1e-9)


def test_blocks_are_packed_anew_when_most_of_their_rows_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken, take = [], Lossless.take

    def spy(codec: Lossless, block: object, rows: torch.Tensor) -> object:
        taken.append((block.num_rows, rows.shape[1]))
        return take(codec, block, rows)

    monkeypatch.setattr(Lossless, "take", spy)
    batch, _ = generate("keydiff", Lossless(window=8, block=16), slots=1)
    assert taken
    assert all(0 < after <= 0.9 * before for before, after in taken)
    for layer in batch.layers:
        for segment in layer._segments[0]:
            assert max(segment.counts) > 0.9 * segment.block.num_rows
            assert segment.counts == tuple(segment.rows.sum(axis=1))


def test_without_packing_anew_the_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = generate("keydiff", Lossless(window=8, block=16))
    monkeypatch.setattr(coded_cache, "_REPACK_BELOW", 0.0)
    _, unpacked = generate("keydiff", Lossless(window=8, block=16))
    assert_same(packed, unpacked, 1e-9)


@pytest.mark.parametrize("codec_name", CODECS)
@pytest.mark.parametrize("policy_name", POLICIES)
def test_every_policy_runs_with_every_codec_within_budget(
    policy_name: str, codec_name: str
) -> None:
    codec = codec_named(codec_name, window=16, block=32)
    batch, generations = generate(policy_name, codec, dtype=torch.float32)
    for generation in generations:
        assert len(generation.token_ids) == NEW_TOKENS
        assert generation.finish_reason == "length"
        if batch.eviction.policy.evicts:
            assert generation.kept_tokens <= 64


@pytest.mark.parametrize("codec_name", [name for name in CODECS if name != "none"])
@pytest.mark.parametrize("policy_name", ["full", "keydiff"])
def test_a_sample_is_the_same_alone_and_among_others(policy_name: str, codec_name: str) -> None:
    codec = codec_named(codec_name, window=16, block=32)
    _, alone = generate(policy_name, codec, slots=1)
    _, together = generate(policy_name, codec, slots=4)
    assert_same(alone, together, 1e-6)
    assert [one.kv_bytes_kept for one in alone] == [one.kv_bytes_kept for one in together]


def test_the_newest_tokens_are_exact_and_the_others_coded() -> None:
    codec = Lossless(window=20, block=8)
    batch, _ = generate("full", codec, slots=1)
    for layer in batch.layers:
        (counts,) = layer._num_exact
        assert all(20 <= count < 28 for count in counts)


def held_by_walking(cache: CodedCache, slot: int, num_tokens: int) -> int:
    """Bytes of what a slot holds, from the objects themselves."""
    total = 0
    for segment in cache._segments[slot]:
        total += segment.live.nbytes
        for part in vars(segment.block).values():
            if isinstance(part, torch.Tensor):
                assert part.untyped_storage().nbytes() == part.nbytes, "a view keeps more alive"
                total += part.nbytes
            elif isinstance(part, bytes):
                total += len(part)
    for head, count in enumerate(cache._num_exact[slot]):
        total += cache.keys[slot, head, :count].nbytes + cache.values[slot, head, :count].nbytes
    total += cache.positions[slot, :, :num_tokens].nbytes
    for column in cache.columns(slice(slot, slot + 1), num_tokens).values():
        total += column.nbytes
    store = cache._probes[slot]
    if store is not None:
        total += store._queries.nbytes + store._positions.nbytes
    return total


@pytest.mark.parametrize("codec_name", [name for name in CODECS if name != "none"])
@pytest.mark.parametrize("policy_name", ["full", "h2o"])
def test_counted_bytes_are_those_of_what_is_held(policy_name: str, codec_name: str) -> None:
    codec = codec_named(codec_name, window=16, block=32)
    batch, generations = generate(
        policy_name, codec, slots=4, dtype=torch.float32, kv_dtype=torch.float16
    )
    for slot, generation in enumerate(generations):
        num_tokens = generation.kept_history[-1].positions[0].shape[1]
        for layer in batch.layers:
            assert layer.held_bytes(slot) == held_by_walking(layer, slot, num_tokens)
        held = sum(layer.held_bytes(slot) for layer in batch.layers)
        assert held <= generation.kv_bytes_kept <= generation.kv_bytes_peak


def test_exact_tokens_in_16_bits_take_half_the_bytes_of_32() -> None:
    _, wide = generate("keydiff", None, dtype=torch.float32)
    _, narrow = generate("keydiff", None, dtype=torch.float32, kv_dtype=torch.float16)
    positions = 3 * 64 * 2 * 4  # layers, tokens, heads, bytes
    for one, other in zip(wide, narrow, strict=True):
        assert one.kv_bytes_kept - positions == 2 * (other.kv_bytes_kept - positions)


def test_a_slot_forgets_the_sequence_before() -> None:
    codec = Lossless(window=4, block=4)
    _, one_slot = generate("streaming_llm", codec, slots=1)
    _, own_slots = generate("streaming_llm", codec, slots=4)
    assert_same(one_slot, own_slots, 1e-9)
    assert [g.kv_bytes_kept for g in one_slot] == [g.kv_bytes_kept for g in own_slots]


def test_saliency_is_asked_for_blocks_only_and_is_the_same_for_any_chunk_size() -> None:
    received = []
    for chunk in (10, 40):
        codec = Lossless(window=10, block=40, weighs=True)
        engine = Engine(toy_model(dtype=torch.float64), policy_named("full"), codec=codec)
        engine.chunk_tokens = chunk
        list(engine.generate([toy_prompt(120)], max_new_tokens=1))
        received.append(codec.weights)
    assert len(received[0]) == len(received[1]) == 3 * 2  # layers, blocks
    assert all(np.all(weights.numpy() >= 0) for weights in received[0])
