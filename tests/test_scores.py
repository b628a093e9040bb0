"""Scores against arithmetic written from the papers' formulas, one head and token at a time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvarena.harness.engine import Engine
from kvarena.harness.testing.oracle import replay_difference
from kvarena.harness.testing.score_calls import copied
from kvarena.policies.base import FutureQueries, LayerView, Policy
from kvarena.policies.caote import CAOTE
from kvarena.policies.corm import CORM
from kvarena.policies.critical import Critical
from kvarena.policies.curdkv import CurDKV
from kvarena.policies.expected_attention import ExpectedAttention
from kvarena.policies.lagkv import LagKV
from kvarena.policies.nacl import NACL
from kvarena.policies.r_kv import RKV
from kvarena.shapes.ada import Ada
from kvarena.shapes.base import Shape
from kvarena.shapes.uniform import Uniform
from toys import toy_model, toy_prompt

S, K, G, T, D, W = 2, 2, 2, 43, 8, 5  # T is no multiple of any partition or block below
POLICIES = [
    CAOTE(),
    CAOTE(window=W),
    LagKV(lag_size=8),
    CurDKV(),
    CORM(window=W),
    NACL(proxies=W),
    RKV(window=W),
    Critical(window=W),
    ExpectedAttention(),
    ExpectedAttention(covariance=False, epsilon=0.01),
]


def view_of(policy: Policy, seed: int = 0, num_tokens: int = T, num_recent: int = 4) -> LayerView:
    """Random tokens in scrambled storage order, some gone from the text, causal attention."""
    generator = torch.Generator().manual_seed(seed)
    text_tokens = 3 * num_tokens
    orders = [torch.randperm(text_tokens, generator=generator) for _ in range(S * K)]
    positions = torch.stack(orders)[:, :num_tokens].view(S, K, num_tokens)
    rows = min(policy.needs.attention_rows, num_tokens)
    # The last of the queries sees all, the one before it all but the newest token, and so on.
    newest_first = (-positions).argsort(-1).argsort(-1).repeat_interleave(G, dim=1)  # [S, H, T]
    ages = torch.arange(rows - 1, -1, -1)
    logits = 2 * torch.randn(S, K * G, rows, num_tokens, generator=generator)
    logits[newest_first[:, :, None] < ages[:, None]] = float("-inf")
    factors = torch.randn(S, K * G, D, 2 * D, generator=generator) / D
    return LayerView(
        layer=3,
        stored_keys=torch.randn(S, K, num_tokens, D, generator=generator),
        stored_values=torch.randn(S, K, num_tokens, D, generator=generator) + 1,
        positions=positions,
        attention=logits.softmax(dim=-1) if rows else None,
        output_norms=torch.rand(S, K, num_tokens, generator=generator) + 0.1,
        future_queries=FutureQueries(
            mean=torch.randn(S, K * G, D, generator=generator),
            covariance=factors @ factors.mT if policy.needs.future_covariance else None,
        ),
        text_tokens=text_tokens,
        num_recent=num_recent,
        num_kept=num_tokens // 2,
    )


def in_text(positions: Tensor) -> list[int]:
    """Storage places of a head's tokens, oldest first; positions: [T]."""
    return sorted(range(len(positions)), key=lambda place: int(positions[place]))


def heads_of(view: LayerView) -> list[tuple[int, int]]:
    return [(s, k) for s in range(view.positions.shape[0]) for k in range(view.positions.shape[1])]


# ---- what holds for all ----


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 16, 17, 31])
@pytest.mark.parametrize("num_recent", [0, 4])
def test_few_tokens_have_finite_scores(policy: Policy, num_tokens: int, num_recent: int) -> None:
    view = view_of(policy, num_tokens=num_tokens, num_recent=num_recent)
    scores = policy.score(view)
    assert scores.shape == (S, K, num_tokens)
    assert scores.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("what", ["keys", "values"])
def test_tokens_that_are_all_alike_have_finite_scores(policy: Policy, what: str) -> None:
    view = view_of(policy, num_recent=0)
    for alike in (torch.zeros(S, K, T, D), torch.ones(S, K, T, D)):
        assert policy.score(replace(view, **{f"stored_{what}": alike})).isfinite().all()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_head_by_itself_has_the_scores_it_has_among_others(policy: Policy) -> None:
    view = view_of(policy)
    scores = policy.score(view)
    for k in range(K):
        attention, future, heads = view.attention, view.future_queries, slice(k * G, (k + 1) * G)
        covariance = future.covariance
        alone = replace(
            view,
            stored_keys=view.stored_keys[:1, k : k + 1],
            stored_values=view.stored_values[:1, k : k + 1],
            positions=view.positions[:1, k : k + 1],
            attention=None if attention is None else attention[:1, heads],
            future_queries=FutureQueries(
                mean=future.mean[:1, heads],
                covariance=None if covariance is None else covariance[:1, heads],
            ),
            output_norms=view.output_norms[:1, k : k + 1],
            kv_heads=slice(k, k + 1),
        )
        torch.testing.assert_close(policy.score(alone), scores[:1, k : k + 1])


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_half_precision_is_scored_in_float32(policy: Policy) -> None:
    view = view_of(policy)
    half = replace(
        view, stored_keys=view.stored_keys.bfloat16(), stored_values=view.stored_values.bfloat16()
    )
    wide = replace(view, stored_keys=half.keys, stored_values=half.values)
    assert torch.equal(policy.score(half), policy.score(wide))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (CAOTE, {"window": 0}, "window must be >= 1 query, got 0"),
        (LagKV, {"lag_size": 1}, "lag_size must be >= 2 tokens, got 1"),
        (CurDKV, {"window": 0}, "window must be >= 1 token, got 0"),
        (CORM, {"window": 0}, "window must be >= 1 query, got 0"),
        (NACL, {"proxies": 0}, "proxies must be >= 1 query, got 0"),
        (NACL, {"random_share": 1.0}, "random_share must be between 0 and 1, got 1.0"),
        (RKV, {"window": 0}, "window must be >= 1 query, got 0"),
        (RKV, {"kernel": 4}, "kernel must be odd and >= 1, got 4"),
        (RKV, {"attention_share": 1.5}, "attention_share must be from 0 to 1, got 1.5"),
        (RKV, {"threshold": -0.1}, "threshold must be from 0 to 1, got -0.1"),
        (Critical, {"window": 0}, "window must be >= 1 query, got 0"),
        (Critical, {"kernel": 4}, "kernel must be odd and >= 1, got 4"),
        (ExpectedAttention, {"skip": -1}, "skip must be >= 0 tokens, got -1"),
        (ExpectedAttention, {"horizon": 0}, "horizon must be >= 1 position, got 0"),
        (ExpectedAttention, {"epsilon": -0.5}, "epsilon must be >= 0, got -0.5"),
        (Critical, {"first_share": 1.5}, "first_share must be from 0 to 1, got 1.5"),
    ],
)
def test_an_option_out_of_range_is_named(
    kind: type[Policy], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


# ---- CAOTE ----


@pytest.mark.parametrize("window", [1, W])
def test_caote_is_how_far_the_output_moves_when_a_token_goes(window: int) -> None:
    """Attention without the token, written out: its weight is shared out among the others."""
    policy = CAOTE(window=window)
    view = view_of(policy)
    scores = policy.score(view)
    for s, k in heads_of(view):
        for j in range(T):
            moved = []
            for h in range(k * G, (k + 1) * G):
                weights = view.attention[s, h].mean(dim=0)
                output = sum(weights[i] * view.values[s, k, i] for i in range(T))
                left = weights.clone()
                left[j] = 0
                left /= left.sum()
                without = sum(left[i] * view.values[s, k, i] for i in range(T))
                moved.append((output - without).norm())
            torch.testing.assert_close(scores[s, k, j], sum(moved) / G, rtol=1e-4, atol=1e-6)


def test_caote_keeps_the_odd_value_before_the_most_attended_token() -> None:
    values = torch.tensor([[1.0, 0], [1, 0], [1, 0], [-9, 5]])[None, None]
    view = LayerView(
        layer=0,
        stored_keys=torch.zeros(1, 1, 4, 2),
        stored_values=values,
        positions=torch.arange(4)[None, None],
        attention=torch.tensor([0.4, 0.2, 0.2, 0.2])[None, None, None],
    )
    assert CAOTE().score(view)[0, 0].argmax() == 3
    # Where all say the same, it does not matter who goes.
    alike = replace(view, stored_values=values[:, :, :1].expand(1, 1, 4, 2))
    assert CAOTE().score(alike).abs().max() < 1e-3


# ---- LagKV ----


def lag_scores(view: LayerView, s: int, k: int, tokens: list[int], lag: list[int]) -> list[float]:
    """Of each token its share of the partition that scores less, by one loop per channel."""
    total = [0.0] * len(tokens)
    for states in (view.keys[s, k].tolist(), view.values[s, k].tolist()):
        deviations = []
        for place in tokens:
            scaled = []
            for c in range(D):
                low, high = min(states[r][c] for r in lag), max(states[r][c] for r in lag)
                scaled.append((states[place][c] - low) / (high - low))
            mean = sum(scaled) / D
            deviations.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (D - 1)))
        weights = [math.exp(x) for x in deviations]
        total = [t + w / sum(weights) for t, w in zip(total, weights, strict=True)]
    return [sum(other < own for other in total) / len(total) for own in total]


@pytest.mark.parametrize("lag_size", [8, 5, 13])
def test_lagkv_scales_each_partition_by_the_next(lag_size: int) -> None:
    policy = LagKV(lag_size=lag_size)
    view = view_of(policy)
    scores = policy.score(view)
    for s, k in heads_of(view):
        order = in_text(view.positions[s, k])
        whole = (T - 4) // lag_size
        parts = [order[4 + p * lag_size : 4 + (p + 1) * lag_size] for p in range(whole)]
        for p in range(whole - 1):
            wanted = lag_scores(view, s, k, parts[p], parts[p + 1])
            torch.testing.assert_close(scores[s, k, parts[p]], torch.tensor(wanted))
        # Sinks, the last whole partition and what follows it come before all of these.
        others = order[:4] + order[4 + (whole - 1) * lag_size :]
        assert scores[s, k, others].min() >= 1
        assert (scores[s, k, others].diff() > 0).all()


def test_lagkv_without_protection_judges_the_last_partition_by_itself() -> None:
    policy, lag_size = LagKV(lag_size=8), 8
    view = view_of(policy, num_recent=0)
    scores = policy.score(view)
    assert scores.max() < 1
    for s, k in heads_of(view):
        order = in_text(view.positions[s, k])
        last = order[(T // lag_size - 1) * lag_size :]
        assert len(last) == lag_size + T % lag_size
        wanted = lag_scores(view, s, k, last, last)
        torch.testing.assert_close(scores[s, k, last], torch.tensor(wanted))
        wanted = lag_scores(view, s, k, order[:lag_size], order[lag_size : 2 * lag_size])
        torch.testing.assert_close(scores[s, k, order[:lag_size]], torch.tensor(wanted))


def test_lagkv_keeps_the_newest_while_there_is_no_second_partition() -> None:
    policy = LagKV(lag_size=20)
    view = view_of(policy)
    assert torch.equal(policy.score(view).argsort(dim=-1), view.positions.argsort(dim=-1))


def test_lagkv_goes_by_the_scale_of_what_follows() -> None:
    """Channels are alike in the token, but not once the next partition has scaled them."""
    states = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    states[0, 0, 2] = 50 * torch.tensor([1.0, -1, 1, -1])  # far outside what follows
    view = LayerView(
        layer=0,
        stored_keys=states,
        stored_values=states,
        positions=torch.arange(8)[None, None],
        num_recent=1,
    )
    policy = LagKV(lag_size=4, sinks=0)
    assert policy.score(view)[0, 0, :4].argmax() == 2
    wide = states.clone()
    wide[:, :, 4] = torch.tensor([1e4, -1e4, 1e4, -1e4])
    wide[:, :, 5] = -wide[:, :, 4]
    scaled = replace(view, stored_keys=wide, stored_values=wide)
    assert policy.score(scaled)[0, 0, 2] <= 0.75
    assert policy.score(scaled)[0, 0, 4:].min() >= 1


@pytest.mark.parametrize(("budget_tokens", "newest"), [(512, 128), (200, 100), (40, 20)])
def test_lagkv_protects_one_partition_or_half_the_budget(budget_tokens: int, newest: int) -> None:
    assert LagKV().num_recent(budget_tokens) == newest
    assert LagKV(recent=150).num_recent(budget_tokens) == 150


@pytest.mark.parametrize("shape", [Uniform(), Ada()], ids=str)
def test_lagkv_is_replayed_with_partitions_that_fit_a_small_budget(shape: Shape) -> None:
    """The budget of the other tests holds no two partitions of the default size."""
    engine = Engine(
        toy_model(dtype=torch.float64),
        LagKV(lag_size=8),
        budget_tokens=64,
        chunk_tokens=24,
        slots=2,
        shape=shape,
    )
    prompts = [toy_prompt(170), toy_prompt(97, seed=1)]
    generations = engine.generate(
        prompts, max_new_tokens=20, record_history=True, record_logits="all"
    )
    for prompt, generation in zip(prompts, generations, strict=True):
        read = prompt + generation.token_ids[:-1]
        difference = replay_difference(
            engine.model, read, generation.kept_history, generation.logits
        )
        assert difference < 1e-9
        # It chooses: what is kept is no unbroken run of newest tokens.
        last = generation.kept_history[-1]
        newest = set(range(last.seen_tokens - 60, last.seen_tokens))
        assert not any(newest <= set(head.tolist()) for layer in last.positions for head in layer)


# ---- CurDKV ----


@pytest.mark.parametrize("window", [16, 5, 1])
def test_curdkv_multiplies_shares_of_blocks_in_the_text(window: int) -> None:
    policy = CurDKV(window=window)
    view = view_of(policy)
    scores = policy.score(view)
    for s, k in heads_of(view):
        order = in_text(view.positions[s, k])
        products = {}
        for start in range(0, T, window):
            block = order[start : start + window]
            shares = []
            for states in (view.keys[s, k], view.values[s, k]):
                squares = [sum(float(x) ** 2 for x in states[place]) for place in block]
                shares.append([x / sum(squares) for x in squares])
            for place, of_key, of_value in zip(block, *shares, strict=True):
                products[place] = of_key * of_value
        total = sum(products.values())
        wanted = [products[place] / total for place in range(T)]
        torch.testing.assert_close(scores[s, k], torch.tensor(wanted))


def test_curdkv_compares_a_token_with_its_neighbours_only() -> None:
    """A block of long keys and values does not push out the rest of the text."""
    policy = CurDKV()
    view = view_of(policy)
    longer = torch.where(view.text_ranks < 16, 100.0, 1.0).unsqueeze(-1)
    scaled = replace(
        view, stored_keys=view.stored_keys * longer, stored_values=view.stored_values * longer
    )
    torch.testing.assert_close(policy.score(scaled), policy.score(view))


def test_curdkv_needs_both_a_long_key_and_a_long_value() -> None:
    keys, values = torch.ones(1, 1, 8, D), torch.ones(1, 1, 8, D)
    keys[..., 2, :], values[..., 2, :] = 3, 3
    keys[..., 5, :], values[..., 5, :] = 6, 0.5
    view = LayerView(
        layer=0, stored_keys=keys, stored_values=values, positions=torch.arange(8)[None, None]
    )
    assert CurDKV().score(view)[0, 0].argmax() == 2


# ---- CORM ----


def test_corm_counts_the_queries_that_find_a_token_important() -> None:
    policy = CORM(window=W)
    view = view_of(policy)
    scores = policy.score(view)
    for s, k in heads_of(view):
        for j in range(T):
            votes, seen = 0, 0.0
            for h in range(k * G, (k + 1) * G):
                for i in range(W):
                    num_visible = T - (W - 1 - i)
                    weight = float(view.attention[s, h, i, j])
                    votes += weight >= 1 / num_visible
                    seen += weight / (G * W)
            torch.testing.assert_close(scores[s, k, j], torch.tensor(votes + seen))


def test_corm_one_strong_look_counts_less_than_two_votes() -> None:
    attention = torch.tensor([[0.80, 0.10, 0.05, 0.05], [0.05, 0.30, 0.30, 0.35]])
    view = LayerView(
        layer=0,
        stored_keys=torch.zeros(1, 1, 4, 2),
        stored_values=torch.zeros(1, 1, 4, 2),
        positions=torch.arange(4)[None, None],
        attention=torch.stack((attention[0], attention[1], attention[1]))[None, None],
    )
    scores = CORM(window=3).score(view)[0, 0]
    assert scores.floor().tolist() == [1, 2, 2, 2]


def test_corm_counts_only_what_a_query_sees() -> None:
    """0.3 is over the mean of four tokens, under that of the three that this query sees."""
    attention = torch.tensor([0.4, 0.3, 0.3, 0.0])[None, None, None]
    view = LayerView(
        layer=0,
        stored_keys=torch.zeros(1, 1, 4, 2),
        stored_values=torch.zeros(1, 1, 4, 2),
        positions=torch.arange(4)[None, None],
        attention=attention,
    )
    assert CORM(window=1).score(view)[0, 0].floor().tolist() == [1, 0, 0, 0]


# ---- NACL ----


def luck_of(policy: NACL, view: LayerView) -> Tensor:
    """What the draw adds to the attention, read back from scores without any attention.

    Only its order can be read: of each token how many are luckier, [S, K, T].
    """
    attention = torch.zeros_like(view.attention)
    drawn = replace(policy, random_share=0.999).score(replace(view, attention=attention))
    return drawn.argsort(dim=-1, descending=True).argsort(dim=-1)


def test_nacl_fills_places_from_the_ranking_and_from_the_draw() -> None:
    policy = NACL(proxies=W, random_share=0.25)
    view = view_of(policy)
    view = replace(view, attention=view.attention / 1e4)  # so little that luck decides the draw
    scores, luck = policy.score(view), luck_of(policy, view)
    for s, k in heads_of(view):
        sums = [
            sum(float(view.attention[s, h, :, j].sum()) for h in range(k * G, (k + 1) * G))
            for j in range(T)
        ]
        by_attention = sorted(range(T), key=lambda j: -sums[j])
        by_draw = sorted(range(T), key=lambda j: int(luck[s, k, j]))
        for num_kept in range(1, T):
            kept = set(scores[s, k].topk(num_kept).indices.tolist())
            # Down to some depth, three of the ranking to one of the draw.
            unions = [
                {*by_attention[: 3 * depth // 4], *by_draw[: depth // 4]} for depth in range(4 * T)
            ]
            smaller = max((u for u in unions if len(u) <= num_kept), key=len)
            larger = min((u for u in unions if len(u) >= num_kept), key=len)
            assert smaller <= kept <= larger


def test_nacl_draws_in_proportion_to_the_softmax_of_the_attention() -> None:
    """First of the draw, over many seeds, as often as its probability says."""
    attention = torch.tensor([0.0, 0.5, 1.0, 2.0])  # sums over more than one query exceed 1
    view = LayerView(
        layer=0,
        stored_keys=torch.zeros(1, 1, 4, 2),
        stored_values=torch.zeros(1, 1, 4, 2),
        positions=torch.tensor([7, 0, 3, 12])[None, None],
        attention=attention[None, None, None],
    )
    num = 4000
    firsts = [
        int(NACL(seed=seed, random_share=0.999).score(view)[0, 0].argmax()) for seed in range(num)
    ]
    seen = torch.bincount(torch.tensor(firsts), minlength=4) / num
    assert (seen - attention.softmax(dim=-1)).abs().max() < 0.025  # three standard errors


def test_nacl_luck_is_of_position_layer_head_and_seed() -> None:
    policy = NACL(proxies=W)
    view = view_of(policy)
    same = replace(view, positions=torch.arange(T).expand(S, K, T))
    luck = luck_of(policy, same)
    assert torch.equal(luck[0], luck[1])
    orders = [
        luck[0, 0],
        luck[0, 1],
        luck_of(policy, replace(same, layer=4))[0, 0],
        luck_of(NACL(proxies=W, seed=1), same)[0, 0],
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert torch.corrcoef(torch.stack((one, other)).float())[0, 1].abs() < 0.5


# ---- R-KV ----


@pytest.mark.parametrize("num_recent", [0, 4, W, 9])
def test_r_kv_weighs_attention_against_redundancy(num_recent: int) -> None:
    policy = RKV(window=W, kernel=5, attention_share=0.3)
    view = view_of(policy, num_recent=num_recent)
    scores = policy.score(view)
    spared = 0
    for s, k in heads_of(view):
        order = in_text(view.positions[s, k])
        judged = order[: T - min(W, num_recent)]
        votes = dict.fromkeys(order, 0.0)
        for j in judged:
            for h in range(k * G, (k + 1) * G):
                rows = view.attention[s, h].tolist()
                shares = [row[j] / sum(row[i] for i in judged) for row in rows]
                votes[j] = max(votes[j], sum(shares) / W)
        keys = [[float(x) for x in key] for key in view.keys[s, k]]
        sums = [0.0] * T
        for i in range(T):
            cosines = {
                j: sum(a * b for a, b in zip(keys[i], keys[j], strict=True))
                / math.hypot(*keys[i])
                / math.hypot(*keys[j])
                for j in range(T)
                if j != i
            }
            near = [j for j in order if j != i and cosines[j] > 0.5]
            spared += bool(near)
            for j in cosines:
                if near[-1:] != [j]:
                    sums[j] += cosines[j]
        powers = [math.exp(x / T) for x in sums]
        wanted = []
        for j in range(T):
            rank = order.index(j)
            pooled = max(votes[i] for i in order[max(0, rank - 2) : rank + 3])
            wanted.append(0.3 * pooled - 0.7 * powers[j] / sum(powers))
        torch.testing.assert_close(scores[s, k], torch.tensor(wanted), atol=1e-6, rtol=1e-4)
    assert spared > S * K * T / 3


def test_r_kv_keeps_the_newest_of_near_copies_and_what_has_none() -> None:
    keys = torch.tensor([[1.0, 0, 0], [2, 0, 0], [3, 0, 0], [0, 1, 0], [0, 0, 1]])
    view = LayerView(
        layer=0,
        stored_keys=keys[None, None],
        stored_values=keys[None, None],
        positions=torch.tensor([5, 9, 2, 0, 1])[None, None],
        attention=torch.full((1, 1, 8, 5), 0.2),
    )
    ranking = RKV().score(view)[0, 0].argsort(descending=True).tolist()
    # Of the three copies the one at position 9 resembles nothing, as far as it counts.
    assert set(ranking[:3]) == {1, 3, 4}
    assert ranking[3:] == [0, 2]


def test_r_kv_is_replayed_with_many_tokens_between_two_evictions() -> None:
    engine = Engine(
        toy_model(dtype=torch.float64), RKV(), budget_tokens=48, chunk_tokens=32, evict_every=16
    )
    prompt = toy_prompt(80)
    (generation,) = engine.generate(
        [prompt], max_new_tokens=60, record_history=True, record_logits="all"
    )
    read = prompt + generation.token_ids[:-1]
    assert replay_difference(engine.model, read, generation.kept_history, generation.logits) < 1e-9
    sizes = [step.positions[0].shape[1] for step in generation.kept_history]
    assert max(sizes) == 48 + 15  # with the next one all go
    # The eight newest stay, so that the last queries of the text have their own keys.
    for step in generation.kept_history:
        for layer in step.positions:
            assert (layer[:, -8:] == torch.arange(step.seen_tokens - 8, step.seen_tokens)).all()


# ---- CriticalKV ----


@pytest.mark.parametrize(("num_recent", "first_share"), [(0, 0.5), (4, 0.5), (9, 0.25), (4, 0.0)])
def test_critical_takes_half_by_attention_and_half_by_what_values_add(
    num_recent: int, first_share: float
) -> None:
    policy = Critical(window=W, kernel=5, first_share=first_share)
    view = view_of(policy, num_recent=num_recent)
    scores = policy.score(view)
    num_window = min(W, num_recent)
    for s, k in heads_of(view):
        order = in_text(view.positions[s, k])
        base = dict.fromkeys(order, 0.0)
        for h in range(k * G, (k + 1) * G):
            votes = [float(view.attention[s, h, :, j].sum()) / W for j in order]
            votes[T - num_window :] = [0.0] * num_window
            for rank, j in enumerate(order):
                base[j] += max(votes[max(0, rank - 2) : rank + 3]) / G
        num_first = int(first_share * (T // 2 - num_recent))
        by_attention = sorted(range(T), key=lambda j: (base[j], view.positions[s, k, j]))
        first = by_attention[T - num_first :]
        others = by_attention[: T - num_first]
        wanted = [(base[j] + 1e-4) * float(view.output_norms[s, k, j]) for j in others]
        torch.testing.assert_close(scores[s, k, others], torch.tensor(wanted))
        assert num_first == 0 or scores[s, k, first].min() > max(wanted)


def test_critical_keeps_a_large_value_before_one_that_is_looked_at_a_little_more() -> None:
    view = LayerView(
        layer=0,
        stored_keys=torch.zeros(1, 1, 4, 2),
        stored_values=torch.zeros(1, 1, 4, 2),
        positions=torch.arange(4)[None, None],
        attention=torch.tensor([0.1, 0.5, 0.22, 0.18])[None, None, None],
        output_norms=torch.tensor([1.0, 0.1, 1.0, 2.0])[None, None],
        num_kept=2,
    )
    policy = Critical(window=1, kernel=1)
    assert policy.score(view)[0, 0].topk(2).indices.tolist() == [1, 3]


# ---- Expected Attention ----


def mean_rotation(first: int, num_positions: int, dim: int) -> list[list[float]]:
    """[dim, dim]: rotary embedding of the halves of a head, averaged over its next positions."""
    mean = [[0.0] * dim for _ in range(dim)]
    for position in range(first, first + num_positions):
        for i in range(dim // 2):
            angle = position * 10000.0 ** (-2 * i / dim)
            for row, column, entry in (
                (i, i, math.cos(angle)),
                (i, i + dim // 2, -math.sin(angle)),
                (i + dim // 2, i, math.sin(angle)),
                (i + dim // 2, i + dim // 2, math.cos(angle)),
            ):
                mean[row][column] += entry / num_positions
    return mean


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
@pytest.mark.parametrize("covariance", [True, False])
def test_expected_attention_of_a_prompt_in_one_chunk_is_the_published_formula(
    covariance: bool, epsilon: float
) -> None:
    """From what the query projection gave, with rotations as matrices, for each token by itself."""
    model, prompt, seen = toy_model(dtype=torch.float64), toy_prompt(40), {}
    attention = model.model.layers[1].self_attn
    attention.q_proj.register_forward_hook(lambda *call: seen.setdefault("queries", call[2][0]))
    policy = ExpectedAttention(covariance=covariance, epsilon=epsilon)
    score = policy.score

    def listening(view: LayerView) -> Tensor:
        scores = score(view)
        if view.layer == 1:
            seen.setdefault("view", copied(view))  # eviction moves what is in the cache
            seen.setdefault("scores", scores)
        return scores

    policy.score = listening
    engine = Engine(model, policy, budget_tokens=20, chunk_tokens=40, slots=1)
    list(engine.generate([prompt], max_new_tokens=1))

    view, queries = seen["view"], seen["queries"].view(40, 4, 16)
    turn = torch.tensor(mean_rotation(40, 512, 16), dtype=torch.float64)
    for k in range(2):
        shares: dict[int, list[float]] = {j: [] for j in range(4, 40)}
        for h in (2 * k, 2 * k + 1):
            counted = queries[4:, h]  # the first four are attention sinks
            mean = sum(counted) / 36
            spread = sum(torch.outer(q - mean, q - mean) for q in counted) / 36
            exponentials = []
            for j in shares:
                key = view.stored_keys[0, k, j]
                logit = (turn @ mean) @ key / math.sqrt(16)
                if covariance:
                    logit += key @ (turn @ spread @ turn.T) @ key / (2 * 16)
                exponentials.append(math.exp(logit))
            for j, x in zip(shares, exponentials, strict=True):
                shares[j].append(x / sum(exponentials))
        for j, (one, other) in shares.items():
            norm = math.hypot(*view.stored_values[0, k, j])
            wanted = ((one + other) / 2 + epsilon) * norm
            assert float(seen["scores"][0, k, j]) == pytest.approx(wanted, rel=1e-4, abs=1e-12)


def test_expected_attention_weighs_first_tokens_beside_the_others() -> None:
    """Unprotected ones have a score as well, and take nothing from the shares of the others."""
    policy = ExpectedAttention(skip=2, covariance=False)
    logits = torch.tensor([3.0, 200.0, 1.0, 2.0, 0.5])
    view = LayerView(
        layer=0,
        stored_keys=logits[None, None, :, None],
        stored_values=torch.ones(1, 1, 5, 1),
        positions=torch.tensor([1, 0, 4, 9, 2])[None, None],
        future_queries=FutureQueries(mean=torch.ones(1, 1, 1), covariance=None),
    )
    scores = policy.score(view)[0, 0]
    torch.testing.assert_close(scores[2:], logits[2:].softmax(dim=0))
    torch.testing.assert_close(scores[0], (logits[0] - logits[2:].logsumexp(dim=0)).exp())
    assert scores.isfinite().all()
    assert scores[1] > scores[0] > scores[3] > scores[2] > scores[4]
