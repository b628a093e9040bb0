"""Rules that each policy must follow, and the one rule that is its own."""

import pytest
import torch

from kvarena.harness.engine import Engine
from kvarena.harness.registry import build, choices, load_choice
from kvarena.policies.base import FutureQueries, LayerView, Needs, NewTokens, Policy
from kvarena.policies.h2o import H2O
from kvarena.policies.keydiff import KeyDiff
from kvarena.policies.l2norm import L2Norm
from kvarena.policies.snapkv import SnapKV
from kvarena.policies.streaming_llm import StreamingLLM
from kvarena.policies.tova import TOVA
from toys import finished, toy_model, toy_prompt

S, K, G, T, D = 3, 2, 2, 40, 16  # heads as in the toy models
POLICIES = choices("policy")

# Every policy is built here, and some of them read a file.
pytestmark = pytest.mark.usefixtures("toy_heads")


def view_of(policy: Policy, seed: int = 0, layer: int = 5) -> LayerView:
    """A random layer in scrambled storage order."""
    generator = torch.Generator().manual_seed(seed)
    rows = min(policy.needs.attention_rows, T)
    attention = torch.rand(S, K * G, rows, T, generator=generator).softmax(dim=-1)
    order = torch.stack([torch.randperm(T, generator=generator) for _ in range(S * K)])
    return LayerView(
        layer=layer,
        layer_heads=(K * G, K),
        stored_keys=torch.randn(S, K, T, D, generator=generator),
        stored_values=torch.randn(S, K, T, D, generator=generator),
        positions=order.view(S, K, T),
        attention=attention if rows else None,
        attention_mass=torch.rand(S, K, T, generator=generator),
        output_norms=torch.rand(S, K, T, generator=generator),
        num_recent=policy.num_recent(T // 2),
        num_kept=T // 2,
        new=NewTokens(
            queries=torch.randn(S, K * G, T, D, generator=generator),
            keys=torch.randn(S, K, T, D, generator=generator),
            values=torch.randn(S, K, T, D, generator=generator),
        ),
        future_queries=FutureQueries(
            mean=torch.randn(S, K * G, D, generator=generator),
            covariance=torch.rand(S, K * G, D, D, generator=generator),
        ),
        columns={name: torch.zeros(S, K, T) for name in policy.columns},
    )


def permuted(view: LayerView, order: torch.Tensor) -> LayerView:
    """The same tokens stored in another order (the same for all heads)."""
    return LayerView(
        layer=view.layer,
        layer_heads=view.layer_heads,
        stored_keys=view.stored_keys[:, :, order],
        stored_values=view.stored_values[:, :, order],
        positions=view.positions[:, :, order],
        attention=None if view.attention is None else view.attention[..., order],
        attention_mass=None if view.attention_mass is None else view.attention_mass[..., order],
        output_norms=view.output_norms[..., order],
        new=NewTokens(
            queries=view.new.queries[:, :, order],
            keys=view.new.keys[:, :, order],
            values=view.new.values[:, :, order],
        ),
        future_queries=view.future_queries,
        columns={name: column[..., order].clone() for name, column in view.columns.items()},
        num_recent=view.num_recent,
        num_kept=view.num_kept,
    )


def ranking(scores: torch.Tensor) -> torch.Tensor:
    return scores.argsort(dim=-1, stable=True)


@pytest.mark.parametrize("name", POLICIES)
def test_scores_have_the_shape_and_repeat(name: str) -> None:
    policy = build(load_choice("policy", name))
    first, second = policy.score(view_of(policy)), policy.score(view_of(policy))
    assert first.shape == (S, K, T)
    assert first.is_floating_point()
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", POLICIES)
def test_storage_order_does_not_matter(name: str) -> None:
    policy = build(load_choice("policy", name))
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    plain = policy.score(view_of(policy))
    moved = policy.score(permuted(view_of(policy), order))
    torch.testing.assert_close(moved, plain[:, :, order])


@pytest.mark.parametrize("name", POLICIES)
def test_a_sequence_is_scored_as_if_alone(name: str) -> None:
    policy = build(load_choice("policy", name))
    view = view_of(policy)
    together = policy.score(view_of(policy))
    for i in range(S):
        alone = LayerView(
            layer=view.layer,
            layer_heads=view.layer_heads,
            stored_keys=view.stored_keys[i : i + 1],
            stored_values=view.stored_values[i : i + 1],
            positions=view.positions[i : i + 1],
            attention=None if view.attention is None else view.attention[i : i + 1],
            attention_mass=None if view.attention_mass is None else view.attention_mass[i : i + 1],
            output_norms=view.output_norms[i : i + 1],
            new=NewTokens(
                queries=view.new.queries[i : i + 1],
                keys=view.new.keys[i : i + 1],
                values=view.new.values[i : i + 1],
            ),
            future_queries=FutureQueries(
                mean=view.future_queries.mean[i : i + 1],
                covariance=view.future_queries.covariance[i : i + 1],
            ),
            columns={name: torch.zeros(1, K, T) for name in policy.columns},
            num_recent=view.num_recent,
            num_kept=view.num_kept,
        )
        torch.testing.assert_close(policy.score(alone)[0], together[i])


@pytest.mark.parametrize("name", POLICIES)
def test_constructor_names_the_bad_value(name: str) -> None:
    settings = load_choice("policy", name)
    with pytest.raises(ValueError, match="-1"):
        build({**settings, "sinks": -1})
    with pytest.raises(ValueError, match="recent must be int, got 'many'"):
        build({**settings, "recent": "many"})


def test_keydiff_pairwise_and_normalised_rank_identically() -> None:
    view = view_of(KeyDiff())
    pairwise = KeyDiff(anchor="pairwise").score(view)
    normalised = KeyDiff(anchor="normalised").score(view)
    assert torch.equal(ranking(pairwise), ranking(normalised))
    assert not torch.equal(ranking(pairwise), ranking(KeyDiff().score(view)))


@pytest.mark.parametrize("anchor", KeyDiff.ANCHORS)
def test_keydiff_ignores_a_common_scale(anchor: str) -> None:
    policy, view = KeyDiff(anchor=anchor), view_of(KeyDiff())
    scaled = LayerView(
        layer=0,
        stored_keys=view.stored_keys * 8,
        stored_values=view.stored_values,
        positions=view.positions,
    )
    assert torch.equal(ranking(policy.score(scaled)), ranking(policy.score(view)))


def test_keydiff_keeps_the_odd_one_out() -> None:
    keys = torch.ones(1, 1, 5, D)
    keys[0, 0, 3] = -1
    view = LayerView(
        layer=0, stored_keys=keys, stored_values=keys, positions=torch.arange(5)[None, None]
    )
    assert KeyDiff().score(view).argmax() == 3


def test_keydiff_refuses_an_unknown_anchor() -> None:
    with pytest.raises(ValueError, match="raw, normalised, median, pairwise, got 'mean'"):
        KeyDiff(anchor="mean")


def test_l2norm_keeps_short_keys_and_skips_early_layers() -> None:
    view = view_of(L2Norm())
    assert torch.equal(ranking(L2Norm().score(view)), ranking(-view.keys.norm(dim=-1)))
    early = view_of(L2Norm(), layer=1)
    assert torch.equal(ranking(L2Norm().score(early)), ranking(early.positions.float()))
    everywhere = L2Norm(skip_layers=())
    assert torch.equal(ranking(everywhere.score(early)), ranking(-early.keys.norm(dim=-1)))


def test_tova_gives_all_heads_the_same_scores() -> None:
    scores = TOVA().score(view_of(TOVA()))
    assert torch.equal(scores[:, 0], scores[:, 1])


def test_snapkv_pools_in_position_order() -> None:
    policy = SnapKV(window=2, kernel=3)
    view = view_of(policy)
    looked_at = 17
    attention = (view.positions == looked_at).float().repeat_interleave(G, dim=1)[:, :, None]
    lone_peak = LayerView(
        layer=0,
        stored_keys=view.stored_keys,
        stored_values=view.stored_values,
        positions=view.positions,
        attention=attention.expand(-1, -1, 2, -1),
    )
    lifted = policy.score(lone_peak) > 0
    for head_positions, head_lifted in zip(
        view.positions.flatten(0, 1), lifted.flatten(0, 1), strict=True
    ):
        assert sorted(head_positions[head_lifted].tolist()) == [16, 17, 18]


def test_snapkv_window_does_not_lift_its_neighbours() -> None:
    policy = SnapKV(window=4, kernel=7)
    view = view_of(policy)
    in_window = (view.positions >= T - 4).float().repeat_interleave(G, dim=1)[:, :, None]
    only_window = LayerView(
        layer=0,
        stored_keys=view.stored_keys,
        stored_values=view.stored_values,
        positions=view.positions,
        attention=in_window.expand(-1, -1, 4, -1),
        num_recent=4,
    )
    assert policy.score(only_window).abs().max() == 0


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_snapkv_sums_queries_and_pools_in_each_query_head_before_it_averages(pooling: str) -> None:
    """Against loops over query heads and positions, on random attention."""
    policy = SnapKV(window=4, kernel=5, pooling=pooling)
    view = view_of(policy)
    scores = policy.score(view)
    for s in range(S):
        for k in range(K):
            at = {int(position): t for t, position in enumerate(view.positions[s, k])}
            expected = dict.fromkeys(range(T), 0.0)
            for head in range(k * G, (k + 1) * G):
                votes = [
                    float(view.attention[s, head, :, at[p]].sum()) if p < T - 4 else 0
                    for p in range(T)
                ]
                for p in range(T):
                    near = [votes[n] if 0 <= n < T else 0 for n in range(p - 2, p + 3)]
                    expected[p] += (max(near) if pooling == "max" else sum(near) / 5) / G
            for p in range(T):
                assert float(scores[s, k, at[p]]) == pytest.approx(expected[p], abs=1e-6)


def test_keydiff_s_median_is_per_channel() -> None:
    keys = torch.tensor([[0.0, 9], [1, 0], [5, 1], [1, 2], [0, 3]])[None, None]
    view = LayerView(
        layer=0, stored_keys=keys, stored_values=keys, positions=torch.arange(5)[None, None]
    )
    anchor = torch.tensor([1.0, 2.0])
    cosines = (keys @ anchor) / (keys.norm(dim=-1) * anchor.norm())
    torch.testing.assert_close(KeyDiff(anchor="median").score(view), -cosines)


class AttentionProbe(Policy):
    """Keeps everything and the attention rows it is handed after the last pass."""

    evicts, columns = False, ("unused",)

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.views = rows, {}

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.rows)

    def score(self, view: LayerView) -> torch.Tensor:
        self.views[view.layer] = view
        return view.positions.float()


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_attention_rows_are_those_of_the_last_queries(architecture: str) -> None:
    """Against the attention that transformers itself reports for one pass over the prompt."""
    model, prompt = toy_model(architecture, dtype=torch.float64), toy_prompt(100)
    probe = AttentionProbe(rows=5)
    next(Engine(model, probe, chunk_tokens=16, slots=1).generate([prompt], max_new_tokens=1))
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([prompt]), output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        view = probe.views[layer]
        assert torch.equal(view.positions[0, 0], torch.arange(100))
        torch.testing.assert_close(
            view.attention, weights[:, :, -5:].double(), atol=1e-6, rtol=1e-5
        )


def test_h2o_adds_up_mass_and_can_divide_by_queries() -> None:
    policy = H2O()
    view = view_of(policy)
    once = policy.score(view).clone()
    torch.testing.assert_close(policy.score(view), 2 * once)
    per_query = H2O(per_query=True).score(view_of(policy))
    torch.testing.assert_close(per_query * (T - view.positions), once)


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 32), (0.25, 48), (1.0, 0)])
def test_h2o_gives_the_rest_of_the_budget_to_the_newest(ratio: float, expected: int) -> None:
    assert H2O(heavy_ratio=ratio).num_recent(64) == expected


def test_h2o_streamed_mass_equals_brute_force_column_sums() -> None:
    """Without eviction the column must be the column sum of the whole attention matrix."""
    model = toy_model("llama", dtype=torch.float64)
    prompt = toy_prompt(90)
    engine = Engine(model, H2O(), budget_tokens=500, chunk_tokens=16, slots=1)
    batch = engine.batch([prompt], max_new_tokens=9)
    (generation,) = finished(batch)
    tokens = prompt + generation.token_ids[:-1]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([tokens]), output_attentions=True).attentions
    for layer, weights in zip(batch.layers, attentions, strict=True):
        by_head = weights[0].sum(dim=1)  # [H, T]
        expected = by_head.view(layer.keys.shape[1], -1, len(tokens)).sum(dim=1)
        streamed = layer.columns(slice(0, 1), len(tokens))["attention_mass"][0]
        order = layer.positions[0, :, : len(tokens)].long().argsort(dim=-1)
        torch.testing.assert_close(
            streamed.gather(-1, order), expected.float(), atol=1e-5, rtol=1e-5
        )


def test_streaming_llm_positions_are_ranks() -> None:
    """In a one-layer model a token's key depends on nothing but the token and its position.

    So the next token under eviction must be that of a fresh pass over just the kept tokens, where
    positions are ranks by construction.
    """
    model = toy_model("llama", num_hidden_layers=1, dtype=torch.float64)
    prompt = toy_prompt(150)
    options = {"budget_tokens": 24, "chunk_tokens": 1, "slots": 1}

    def last_logits(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
        generation = next(
            Engine(model, policy, **options).generate(
                [prompt], max_new_tokens=1, record_history=True, record_logits="all"
            )
        )
        kept_before_last = generation.kept_history[-2].positions[0][0]
        seen = [prompt[i] for i in kept_before_last] + prompt[-1:]
        with torch.inference_mode():
            fresh = model(torch.tensor([seen])).logits[0, -1]
        return generation.logits[-1], fresh

    by_rank, fresh = last_logits(StreamingLLM())
    torch.testing.assert_close(by_rank, fresh, atol=1e-4, rtol=1e-4)
    by_origin, fresh = last_logits(StreamingLLM(reindex=False))
    assert (by_origin - fresh).abs().max() > 1e-2


def test_streaming_llm_keeps_sinks_and_the_newest() -> None:
    engine = Engine(toy_model(), StreamingLLM(), budget_tokens=20, chunk_tokens=7, slots=1)
    generation = next(engine.generate([toy_prompt(100)], max_new_tokens=11, record_kept=True))
    expected = torch.tensor([0, 1, 2, 3, *range(110 - 16, 110)])
    for positions in generation.kept_positions:
        assert torch.equal(positions, expected.expand_as(positions))
