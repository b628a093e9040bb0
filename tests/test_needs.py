"""What the engine hands over on request, against arithmetic on what it held at that moment."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvarena.codecs.base import Codec
from kvarena.harness.engine import Engine
from kvarena.harness.engine.forward_pass import ForwardPass
from kvarena.harness.engine.layer_cache import LayerCache
from kvarena.harness.engine.output_norms import output_norms
from kvarena.harness.engine.query_statistics import QueryStatistics
from kvarena.harness.engine.rotary import KeyRotator
from kvarena.harness.errors import UsageError
from kvarena.policies.base import LayerView, Needs, Policy
from kvarena.policies.snapkv import SnapKV
from kvarena.shapes.ada import Ada
from kvarena.shapes.base import Shape
from kvarena.shapes.uniform import Uniform
from lossless import Lossless
from toys import finished, kernel_for, toy_model, toy_prompt

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 3  # of the toy models
GROUP = HEADS // KV_HEADS
W = 8
ROWS = Needs(attention_rows=W, rows_over_steps=True)
STORES = [(Uniform(), None), (Ada(), None), (Uniform(), Lossless(window=5, block=4))]


@dataclass(kw_only=True)
class Scrambled(Policy):
    """Keeps tokens by a number that has nothing to do with age, and shows each view to ``look``."""

    columns = ("unused",)  # so that every pass is scored
    asks: Needs
    look: Callable  # is shown each view
    num_views: int = field(default=0, init=False)

    @property
    def needs(self) -> Needs:
        return self.asks

    def score(self, view: LayerView) -> Tensor:
        self.look(view)
        self.num_views += 1
        return (view.positions * 7919 % 101).float()


def run(policy: Policy, model: Any, attention: str = "sdpa", **options: Any) -> None:
    engine = Engine(model, policy, budget_tokens=20, slots=1, attention=attention, **options)
    # One slot, so that the second request comes after another one's state.
    list(engine.generate([toy_prompt(50), toy_prompt(41, seed=1)], max_new_tokens=15))


# ---- attention rows over steps ----


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """By layer, the queries [H, Q, D] of all passes of the request that is running."""
    seen: dict[int, list[Tensor]] = defaultdict(list)
    attend = ForwardPass.attend

    def listening(
        self: ForwardPass, module: Any, query: Tensor, key: Tensor, value: Tensor, spec: Any
    ) -> Tensor:
        if self.cohorts[0].positions[0, 0] == 0:
            seen[module.layer_idx] = []
        seen[module.layer_idx].append(query[0])
        return attend(self, module, query, key, value, spec)

    monkeypatch.setattr(ForwardPass, "attend", listening)
    return seen


@pytest.mark.parametrize(("shape", "codec"), STORES, ids=["uniform", "ada", "coded"])
@pytest.mark.parametrize("chunk_tokens", [3, 8, 13])
@pytest.mark.parametrize("sliding_window", [None, 12])
def test_rows_over_steps_are_the_attention_of_the_last_queries_of_the_text(
    sliding_window: int | None,
    chunk_tokens: int,
    shape: Shape,
    codec: Codec | None,
    queries: dict[int, list[Tensor]],
) -> None:
    """Written out: softmax over the held keys that a query could see, 0 where there is none."""

    def look(view: LayerView) -> None:
        text = torch.cat(queries[view.layer], dim=1)  # [H, tokens so far, D]
        assert view.attention.shape[1:3] == (view.positions.shape[1] * GROUP, W)
        for k in range(view.positions.shape[1]):
            positions = view.positions[0, k]
            for g in range(GROUP):
                head = (view.kv_heads.start + k) * GROUP + g
                for w in range(W):
                    at = text.shape[1] - W + w
                    visible = positions <= at
                    if sliding_window is not None:
                        visible &= positions > at - sliding_window
                    expected = torch.zeros(len(positions), dtype=torch.float64)
                    if at >= 0 and visible.any():
                        logits = view.stored_keys[0, k] @ text[head, at] * HEAD_DIM**-0.5
                        expected[visible] = logits[visible].softmax(dim=-1)
                    found = view.attention[0, k * GROUP + g, w].double()
                    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)

    policy = Scrambled(asks=ROWS, look=look)
    model = toy_model(
        "mistral", dtype=torch.float64, sliding_window=sliding_window, num_hidden_layers=2
    )
    run(policy, model, chunk_tokens=chunk_tokens, shape=shape, codec=codec)
    assert policy.num_views > 2 * 2 * 14


def test_rows_over_steps_come_with_rows_and_with_original_positions() -> None:
    for options in ({}, {"attention_rows": 3, "rank_positions": True}):
        with pytest.raises(ValueError, match="rows_over_steps needs attention_rows >= 1, and orig"):
            Needs(rows_over_steps=True, **options)


# ---- output norms ----


def weight_of(model: Any, layer: int) -> Tensor:
    return model.model.layers[layer].self_attn.o_proj.weight  # [C, H * D]


@pytest.mark.parametrize(("shape", "codec"), STORES, ids=["uniform", "ada", "coded"])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_oss"])
def test_output_norms_stay_with_their_tokens(
    architecture: str, shape: Shape, codec: Codec | None
) -> None:
    # GPT-OSS's experts do not run in float64.
    dtype = torch.float32 if architecture == "gpt_oss" else torch.float64
    model = toy_model(architecture, dtype=dtype)

    def look(view: LayerView) -> None:
        assert set(view.columns) == {"unused"}
        for k in range(view.positions.shape[1]):
            norms = []
            for g in range(GROUP):
                head = (view.kv_heads.start + k) * GROUP + g
                own = weight_of(model, view.layer)[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
                norms.append(
                    [sum(abs(float(x)) for x in own @ v) for v in view.stored_values[0, k]]
                )
            expected = torch.tensor(norms, dtype=torch.float64).mean(dim=0)
            torch.testing.assert_close(view.output_norms[0, k], expected.float())

    policy = Scrambled(asks=Needs(output_norms=True), look=look)
    run(policy, model, kernel_for(architecture), chunk_tokens=13, shape=shape, codec=codec)
    assert policy.num_views > 2 * LAYERS * 14


def test_a_layer_without_a_known_output_projection_is_refused_in_one_line() -> None:
    class Attention(nn.Module):
        def __init__(self, **children: nn.Module) -> None:
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    values = torch.ones(1, KV_HEADS, 3, HEAD_DIM)
    fitting = nn.Linear(HEADS * HEAD_DIM, 5, bias=False)
    assert output_norms(Attention(dense=fitting), values, HEADS).shape == (1, KV_HEADS, 3)
    for module in (
        Attention(q_proj=fitting),
        Attention(o_proj=nn.Linear(7, 5)),
        Attention(o_proj=nn.Identity()),
    ):
        with pytest.raises(UsageError, match=r"^Attention has no output projection .* this model$"):
            output_norms(module, values, HEADS)


# ---- future queries ----

SKIPPED, NEXT = 4, 512
FUTURE = Needs(future_queries=NEXT, future_covariance=True, skipped_queries=SKIPPED)


def rotations(model: Any, layer: int, num_positions: int) -> Tensor:
    """[N, D, D]: what the embedding does to a query at each position, written as matrices."""
    layer_type = getattr(model.model.layers[layer].self_attn, "layer_type", None)
    rotary = model.model.rotary_emb
    frequencies = getattr(rotary, f"{layer_type}_inv_freq", None)
    frequencies = rotary.inv_freq if frequencies is None else frequencies
    scale = getattr(rotary, "attention_scaling", 1.0)
    half = len(frequencies)
    matrices = torch.eye(HEAD_DIM, dtype=torch.float64).repeat(num_positions, 1, 1)
    for p in range(num_positions):
        for i, frequency in enumerate(frequencies.double()):
            cos, sin = torch.cos(p * frequency), torch.sin(p * frequency)
            matrices[p, i, i] = matrices[p, i + half, i + half] = cos * scale
            matrices[p, i, i + half], matrices[p, i + half, i] = -sin * scale, sin * scale
    return matrices


def check_future_queries(model: Any, queries: dict[int, list[Tensor]], **options: Any) -> None:
    turns = [rotations(model, layer, 70 + NEXT) for layer in range(LAYERS)]

    def look(view: LayerView) -> None:
        text = torch.cat(queries[view.layer], dim=1).double()  # [H, tokens so far, D]
        num_seen = text.shape[1]
        turn = turns[view.layer][num_seen : num_seen + NEXT].mean(dim=0)
        for k in range(view.positions.shape[1]):
            for g in range(GROUP):
                head = (view.kv_heads.start + k) * GROUP + g
                mean = torch.zeros(HEAD_DIM, dtype=torch.float64)
                covariance = torch.zeros(HEAD_DIM, HEAD_DIM, dtype=torch.float64)
                if num_seen > SKIPPED:
                    plain = torch.stack(
                        [
                            torch.linalg.solve(turns[view.layer][at], text[head, at])
                            for at in range(SKIPPED, num_seen)
                        ]
                    )
                    mean, covariance = plain.mean(dim=0), torch.cov(plain.T, correction=0)
                found = view.future_queries
                wanted = turn @ mean * HEAD_DIM**-0.5
                torch.testing.assert_close(
                    found.mean[0, k * GROUP + g].double(), wanted, atol=1e-4, rtol=1e-4
                )
                wanted = turn @ covariance.view(HEAD_DIM, HEAD_DIM) @ turn.T / HEAD_DIM
                torch.testing.assert_close(
                    found.covariance[0, k * GROUP + g].double(), wanted, atol=1e-4, rtol=1e-4
                )

    policy = Scrambled(asks=FUTURE, look=look)
    run(policy, model, **options)
    assert policy.num_views > 2 * LAYERS * 14


@pytest.mark.parametrize(("shape", "codec"), STORES, ids=["uniform", "ada", "coded"])
@pytest.mark.parametrize("chunk_tokens", [3, 13])
def test_future_queries_are_those_so_far_turned_to_the_next_positions(
    chunk_tokens: int, shape: Shape, codec: Codec | None, queries: dict[int, list[Tensor]]
) -> None:
    model = toy_model(dtype=torch.float64)
    check_future_queries(model, queries, chunk_tokens=chunk_tokens, shape=shape, codec=codec)


@pytest.mark.parametrize("architecture", ["partial", "gemma3", "gpt_oss"])
def test_future_queries_are_turned_as_the_model_turns_them(
    architecture: str, queries: dict[int, list[Tensor]]
) -> None:
    """Half of the channels only, frequencies by type of layer, an embedding with a scale."""
    if architecture == "partial":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        model = toy_model("phi3", rope_parameters=rope)
        assert len(model.model.rotary_emb.inv_freq) == HEAD_DIM // 4
    else:
        model = toy_model(architecture)
    check_future_queries(model, queries, attention=kernel_for(architecture), chunk_tokens=13)


def test_a_layer_without_rotary_positions_expects_its_queries_as_they_are() -> None:
    rotator = KeyRotator(toy_model())
    heads, layer = torch.randn(2, 3, 4, HEAD_DIM), nn.Module()
    layer.use_rope = False
    positions = torch.arange(5).expand(2, -1)
    assert torch.equal(rotator.turn_to_next(layer, heads, positions, NEXT), heads)


def test_the_rotations_of_the_next_positions_are_worked_out_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, asked = toy_model(), []
    forward = type(model.model.rotary_emb).forward

    def listening(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(position_ids.shape[-1])
        return forward(self, x, position_ids)

    monkeypatch.setattr(type(model.model.rotary_emb), "forward", listening)
    run(Scrambled(asks=FUTURE, look=lambda _: None), model, chunk_tokens=13)
    assert sum(length > NEXT for length in asked) == 1
    num_passes = 4 + 14 + 4 + 14
    assert len(asked) == 1 + 2 * num_passes  # the model's own, and one for all layers


@pytest.mark.parametrize("chunks", [[1] * 40, [3, 1, 20, 16], [40]])
def test_statistics_over_chunks_are_those_of_all_queries_at_once(chunks: list[int]) -> None:
    """In float32, of queries whose mean is a thousand times their spread; two texts, one longer."""
    generator = torch.Generator().manual_seed(0)
    queries = 1000 + torch.randn(2, HEADS, 40, HEAD_DIM, generator=generator)
    positions = torch.stack([torch.arange(40), torch.arange(40) + 2])
    statistics = QueryStatistics(3, SKIPPED, with_covariance=True)
    slots = slice(1, 3)
    statistics.observe(slots, -queries, positions)  # of other requests
    for slot in range(3):
        statistics.clear(slot)
    for new, at in zip(queries.split(chunks, dim=2), positions.split(chunks, dim=1), strict=True):
        statistics.observe(slots, new, at)
    means, covariances = statistics.of(slots)
    for s, first in enumerate((SKIPPED, SKIPPED - 2)):
        for head in range(HEADS):
            counted = queries[s, head, first:].double()
            torch.testing.assert_close(
                means[s, head, 0].double(), counted.mean(dim=0), atol=2e-4, rtol=0
            )
            wanted = torch.cov(counted.T, correction=0)
            torch.testing.assert_close(covariances[s, head].double(), wanted, atol=1e-3, rtol=0)
    assert all(not buffer[0].any() for buffer in statistics._buffers)


def test_only_what_is_expected_can_leave_tokens_out_and_only_with_original_positions() -> None:
    for options in ({"skipped_queries": 4}, {"future_covariance": True}):
        with pytest.raises(ValueError, match=r"need future_queries >= 1$"):
            Needs(**options)
    with pytest.raises(ValueError, match="future_queries needs original positions"):
        Needs(future_queries=1, rank_positions=True)


# ---- what they cost ----


def bytes_of(policy: Policy, **options: Any) -> tuple[int, int]:
    """Allocated for all slots, and most that the first request held."""
    engine = Engine(toy_model(), policy, budget_tokens=40, chunk_tokens=10, slots=2, **options)
    batch = engine.batch([toy_prompt(60), toy_prompt(55, seed=1)], max_new_tokens=9)
    generation = finished(batch)[0]
    for layer in batch.layers:
        assert sum(layer.held_bytes(slot) for slot in range(2)) <= layer.allocated_bytes
    return batch.kv_bytes_allocated, generation.kv_bytes_kept


@pytest.mark.parametrize("shape", [Uniform(), Ada()], ids=str)
@pytest.mark.parametrize("codec", [None, Lossless(window=5, block=4)], ids=["exact", "coded"])
def test_all_that_is_kept_for_a_need_is_counted(shape: Shape, codec: Codec | None) -> None:
    base, rows, norms, future = (
        bytes_of(Scrambled(asks=asks, look=lambda _: None), shape=shape, codec=codec)
        for asks in (Needs(), ROWS, Needs(output_norms=True), FUTURE)
    )
    # Of each query its vector and its place in the text, which heads of their own note each.
    num_stores = KV_HEADS if isinstance(shape, Ada) else 1
    own = LAYERS * W * (HEADS * HEAD_DIM * 4 + num_stores * 4)
    places = LAYERS * KV_HEADS * 4
    assert [norms[1] - base[1], norms[0] - base[0]] == [places * 40, 2 * places * 50]
    assert [rows[1] - base[1], rows[0] - base[0]] == [own, 2 * own]
    own = LAYERS * 4 * (HEADS * (HEAD_DIM + HEAD_DIM**2) + num_stores)  # and how many there were
    assert [future[1] - base[1], future[0] - base[0]] == [own, 2 * own]


def test_a_policy_that_asks_for_nothing_keeps_nothing_more() -> None:
    batch = Engine(toy_model(), SnapKV(), budget_tokens=40, chunk_tokens=10).batch(
        [toy_prompt(60)], max_new_tokens=2
    )
    finished(batch)
    for layer in batch.layers:
        assert isinstance(layer, LayerCache)
        assert layer.queries is None
        assert layer.statistics is None
        assert set(layer._buffers) == {"keys", "values", "positions"}
