"""Budget shapes: who gets how much, stored for real, right numbers, within the bound."""

import importlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvarena.harness.engine import Engine, Generation, Request
from kvarena.harness.engine.eviction import Eviction, Limit
from kvarena.harness.errors import UsageError
from kvarena.harness.protection import Protection
from kvarena.harness.registry import build, choices, load_choice
from kvarena.harness.testing.oracle import replay_difference
from kvarena.policies.keydiff import KeyDiff
from kvarena.policies.streaming_llm import StreamingLLM
from kvarena.shapes.ada import Ada
from kvarena.shapes.base import Shape
from kvarena.shapes.pyramid import Pyramid
from kvarena.shapes.uniform import Uniform
from toys import ARCHITECTURES, finished, kernel_for, toy_model, toy_prompt

Global = importlib.import_module("kvarena.shapes.global").Global

BUDGET, CHUNK, NEW_TOKENS = 64, 24, 40
PROMPTS = [toy_prompt(170), toy_prompt(97, seed=1), toy_prompt(31, seed=2)]
SHAPES = choices("shape")
RAGGED = ["ada", "global"]
POLICIES = [name for name in choices("policy") if name != "full"]

# Every policy is built here, and some of them read a file.
pytestmark = pytest.mark.usefixtures("toy_heads")


def policy_for(name: str, shape: str | Shape) -> Any:
    settings = load_choice("policy", name)
    if name == "streaming_llm" and shape in RAGGED:
        settings["reindex"] = False
    return build(settings)


def engine_for(
    policy: str = "keydiff",
    shape: str | Shape = "ada",
    architecture: str = "llama",
    model: Any = None,
    **options: Any,
) -> Engine:
    return Engine(
        model or toy_model(architecture, dtype=torch.float64),
        policy_for(policy, shape),
        **{
            "shape": build(load_choice("shape", shape)) if isinstance(shape, str) else shape,
            "budget_tokens": BUDGET,
            "chunk_tokens": CHUNK,
            "slots": 2,
            "attention": kernel_for(architecture),
        }
        | options,
    )


def generate(engine: Engine, prompts: Sequence[list[int]] = PROMPTS) -> list[Generation]:
    return list(
        engine.generate(
            prompts, max_new_tokens=NEW_TOKENS, record_history=True, record_logits="all"
        )
    )


def difference(engine: Engine, prompt: list[int], generation: Generation) -> float:
    ranks = engine.policy.needs.rank_positions
    return replay_difference(
        engine.model,
        prompt + generation.token_ids[:-1],
        generation.kept_history,
        generation.logits,
        num_rank_sinks=engine.eviction.sinks if ranks else None,
    )


def num_held(step: Any) -> list[list[int]]:
    """By layer and head."""
    return [[len(head) for head in layer] for layer in step.positions]


# ---- the oracle, the bound, independence ----


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", ["pyramid", "ada", "global"])
def test_engine_equals_a_full_cache_that_hides_the_evicted(shape: str, policy: str) -> None:
    if (shape, policy) == ("pyramid", "streaming_llm"):
        pytest.skip("the oracle knows ranks that are alike in all layers only")
    engine = engine_for(policy, shape)
    for prompt, generation in zip(PROMPTS, generate(engine), strict=True):
        assert difference(engine, prompt, generation) < 1e-9


@pytest.mark.parametrize("shape", ["pyramid", "ada", "global"])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "llama"])
def test_the_oracle_holds_on_every_architecture(architecture: str, shape: str) -> None:
    engine = engine_for("h2o", shape, architecture, model=toy_model(architecture))
    for prompt, generation in zip(PROMPTS, generate(engine), strict=True):
        assert difference(engine, prompt, generation) < 2e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_all_heads_together_hold_the_budget_and_no_place_more(shape: str) -> None:
    engine = engine_for("keydiff", shape)
    batch = engine.batch(PROMPTS[:2], max_new_tokens=NEW_TOKENS, record_history=True)
    most_bytes, found = 0, []
    while batch.has_work:
        found += batch.step()
        most_bytes = max(most_bytes, batch.kv_bytes_allocated)
    config = engine.model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    per_place = 2 * config.head_dim * 8 + 4  # keys and values in float64, and the position
    assert most_bytes <= 2 * heads * (BUDGET + CHUNK) * per_place
    for generation in found:
        for step in generation.kept_history:
            assert sum(map(sum, num_held(step))) == heads * min(BUDGET, step.seen_tokens) or (
                shape == "pyramid" and sum(map(sum, num_held(step))) <= heads * BUDGET
            )
        held_bytes = heads * BUDGET * per_place
        assert generation.kv_bytes_kept == held_bytes


@pytest.mark.parametrize("policy", ["h2o", "keydiff", "snapkv"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_runs_beside_changes_nothing(shape: str, policy: str) -> None:
    together = generate(engine_for(policy, shape, slots=3))
    for prompt, beside in zip(PROMPTS, together, strict=True):
        (alone,) = generate(engine_for(policy, shape, slots=1), [prompt])
        assert alone.token_ids == beside.token_ids
        for one, other in zip(alone.kept_history, beside.kept_history, strict=True):
            for layer, same in zip(one.positions, other.positions, strict=True):
                assert all(map(torch.equal, layer, same))


@pytest.mark.parametrize("shape", RAGGED)
def test_heads_come_to_hold_different_numbers_of_tokens(shape: str) -> None:
    """Random weights give all heads alike scores of keys, so attention mass is asked here."""
    for generation in generate(engine_for("h2o", shape))[:2]:
        counts = [count for layer in num_held(generation.kept_history[-1]) for count in layer]
        assert len(set(counts)) > 1
        assert min(counts) >= round(0.2 * BUDGET)


@pytest.mark.parametrize("codec", [name for name in choices("codec") if name != "none"])
@pytest.mark.parametrize("shape", ["pyramid", "ada", "global"])
def test_shapes_go_with_every_codec(shape: str, codec: str) -> None:
    coded = build({**load_choice("codec", codec), "window": 16, "block": 32})
    engine = engine_for("h2o", shape, codec=coded, model=toy_model())
    batch = engine.batch(PROMPTS, max_new_tokens=NEW_TOKENS, record_history=True)
    (longest, *_) = finished(batch)
    config = engine.model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    assert sum(map(sum, num_held(longest.kept_history[-1]))) == heads * BUDGET
    even = generate(engine_for("h2o", "uniform", codec=coded, model=toy_model()))[0]
    assert longest.kv_bytes_kept <= 1.1 * even.kv_bytes_kept


@pytest.mark.parametrize("shape", RAGGED)
def test_tokens_in_another_data_type_are_stored_by_head_as_well(shape: str) -> None:
    engine = engine_for("keydiff", shape, kv_dtype=torch.float16, model=toy_model())
    plain = engine_for("keydiff", shape, model=toy_model())
    for half, whole in zip(generate(engine), generate(plain), strict=True):
        assert half.kv_bytes_kept < 0.6 * whole.kv_bytes_kept
        assert half.kept_tokens == whole.kept_tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_a_question_evicts_nothing_and_stays_in_the_budget(shape: str) -> None:
    engine = engine_for("h2o", shape)
    request = Request(prompt=PROMPTS[0], max_new_tokens=8, question_tokens=20)
    (generation,) = engine.generate([request], record_history=True)
    context, question = [
        next(step for step in generation.kept_history if step.seen_tokens == seen)
        for seen in (150, 170)
    ]
    for before, after in zip(context.positions, question.positions, strict=True):
        for own, later in zip(before, after, strict=True):
            assert later.tolist() == [*own.tolist(), *range(150, 170)]
    layers = [sum(layer) / len(layer) for layer in num_held(question)]
    assert sum(layers) == BUDGET * len(layers)


# ---- the shares ----


def test_ada_with_alpha_1_equals_uniform() -> None:
    even = generate(engine_for("h2o", "uniform"))
    floored = generate(engine_for("h2o", shape="ada"))
    for one, other in zip(even, generate(engine_for("h2o", shape=Ada(alpha=1))), strict=True):
        assert one.token_ids == other.token_ids
        for layer, same in zip(
            one.kept_history[-1].positions, other.kept_history[-1].positions, strict=True
        ):
            assert all(map(torch.equal, layer, same))
    assert num_held(floored[0].kept_history[-1]) != num_held(even[0].kept_history[-1])


def test_global_on_one_layer_equals_ada() -> None:
    model = toy_model(dtype=torch.float64, num_hidden_layers=1)
    ada, across = (generate(engine_for("h2o", shape, model=model)) for shape in RAGGED)
    for one, other in zip(ada, across, strict=True):
        assert one.token_ids == other.token_ids
        for before, after in zip(one.kept_history, other.kept_history, strict=True):
            assert all(map(torch.equal, before.positions[0], after.positions[0]))


@given(
    budget=st.integers(8, 5000),
    share=st.floats(0, 0.9),
    num_layers=st.integers(1, 80),
    beta=st.floats(1, 100),
)
def test_pyramid_s_layers_get_what_uniform_s_get_together(
    budget: int, share: float, num_layers: int, beta: float
) -> None:
    shape, protected = Pyramid(beta=beta), int(share * budget)
    layers = [shape.layer_tokens(budget, protected, n, num_layers) for n in range(num_layers)]
    assert sum(layers) == num_layers * budget
    assert min(layers) >= protected
    assert all(upper <= lower + 1 for lower, upper in pairwise(layers))


def written_out(scores: Sequence[Tensor], budget: int, alpha: float) -> list[int]:
    """Token by token: each head's best ones up to the floor, then the best of all that are left."""
    floor = round(alpha * budget)
    kept, left = [], []
    for head, own in enumerate(scores):
        ranked = sorted(own.tolist(), reverse=True)
        kept.append(min(floor, len(ranked)))
        left += [(-score, head) for score in ranked[floor:]]
    for _, head in sorted(left)[: len(scores) * budget - sum(kept)]:
        kept[head] += 1
    return kept


@given(
    st.integers(2, 5),
    st.integers(4, 12),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_ada_shares_by_score_above_its_floor(
    num_heads: int, budget: int, alpha: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [
        (torch.randn(budget + 3 + head, generator=generator) * (head + 1)).round(decimals=1)
        for head in range(num_heads)
    ]
    assert Ada(alpha=alpha).head_tokens(scores, budget) == written_out(scores, budget, alpha)


# ---- protection and lazy eviction ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", ["h2o", "keydiff", "oracle", "r_kv", "snapkv", "tova"])
def test_protected_tokens_stay_in_every_head(policy: str, shape: str) -> None:
    engine = engine_for(policy, shape, protection=Protection(4, 16))
    for generation in generate(engine)[:2]:
        step = generation.kept_history[-1]
        wanted = {*range(4), *range(step.seen_tokens - 16, step.seen_tokens)}
        assert all(wanted <= set(head.tolist()) for layer in step.positions for head in layer)


@pytest.mark.parametrize(("policy", "newest"), [("h2o", 32), ("snapkv", 32)])
def test_none_really_protects_nothing(policy: str, newest: int) -> None:
    """As published, half of H2O's budget and SnapKV's window are never evicted."""

    def keeps_newest(protection: Protection) -> bool:
        (generation,) = generate(engine_for(policy, "uniform", protection=protection), PROMPTS[:1])
        return all(
            set(range(step.seen_tokens - newest, step.seen_tokens)) <= set(head.tolist())
            for step in generation.kept_history
            if step.seen_tokens > BUDGET
            for layer in step.positions
            for head in layer
        )

    assert keeps_newest(Protection())
    assert not keeps_newest(Protection.parse("none"))


def test_sinks_of_another_number_are_moved_as_well() -> None:
    engine = engine_for("streaming_llm", "uniform", protection=Protection(7, 16))
    for prompt, generation in zip(PROMPTS, generate(engine), strict=True):
        assert difference(engine, prompt, generation) < 1e-9


@pytest.mark.parametrize(
    ("text", "of_h2o"), [("paper", (0, 32)), ("none", (0, 0)), ("4+16", (4, 16))]
)
def test_protection_is_read_and_written(text: str, of_h2o: tuple[int, int]) -> None:
    protection = Protection.parse(text)
    assert str(protection) == text
    assert protection.of(policy_for("h2o", "uniform"), 64) == of_h2o


@pytest.mark.parametrize("text", ["4", "4+", "-1+4", "papers", 4, None])
def test_protection_of_another_form_is_refused(text: object) -> None:
    with pytest.raises(UsageError, match=r"protect=.*: give paper .*, none, or first\+newest"):
        Protection.parse(text)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", ["keydiff", "h2o", "snapkv"])
def test_lazy_eviction_waits_for_k_tokens_and_then_takes_them_all(policy: str, shape: str) -> None:
    every = 8
    engine = engine_for(policy, shape, evict_every=every)
    # Pyramid's first layer fills up with the longest prompt only.
    num = 1 if shape == "pyramid" else 2
    for prompt, generation in zip(PROMPTS[:num], generate(engine)[:num], strict=True):
        assert difference(engine, prompt, generation) < 1e-9
        answering = [s for s in generation.kept_history if s.seen_tokens > len(prompt)]
        means = [sum(map(sum, num_held(s))) / sum(map(len, num_held(s))) for s in answering]
        assert means[: 2 * every] == [BUDGET + n % every for n in range(1, 2 * every + 1)]


def test_lazy_eviction_stays_within_its_own_bound() -> None:
    engine = engine_for("keydiff", "uniform", evict_every=3 * CHUNK)
    batch = engine.batch(PROMPTS[:1], max_new_tokens=4 * CHUNK)
    finished(batch)
    assert batch.layers[0].keys.shape[2] == BUDGET + 3 * CHUNK


# ---- what cannot be ----


@pytest.mark.parametrize("kind", [Ada, Global])
@pytest.mark.parametrize("alpha", [-0.1, 1.5, "much"])
def test_an_alpha_out_of_range_is_refused(kind: type[Shape], alpha: Any) -> None:
    with pytest.raises(ValueError, match="alpha must be a number from 0 to 1"):
        kind(alpha=alpha)


def test_pyramid_s_beta_is_at_least_1() -> None:
    with pytest.raises(ValueError, match="beta must be a number of at least 1"):
        Pyramid(beta=0.5)


def test_a_policy_that_keeps_everything_has_no_shape() -> None:
    with pytest.raises(UsageError, match=r"Full keeps everything.*leave shape=uniform"):
        engine_for("full", "ada")


def test_ranks_as_positions_need_heads_that_hold_the_same_number() -> None:
    with pytest.raises(UsageError, match=r"set policy\.reindex=false"):
        Eviction(policy=StreamingLLM(), num_layers=2, shape=Ada())


def test_a_budget_must_leave_a_choice_in_every_layer() -> None:
    eviction = Eviction(
        policy=KeyDiff(), num_layers=30, shape=Pyramid(), protection=Protection(4, 12)
    )
    eviction.check(64)
    with pytest.raises(UsageError, match=r"gives 16 in layer \d+, leaves nothing to choose: 16"):
        eviction.check(20)


def test_layers_share_what_the_question_leaves_and_all_hold_the_question() -> None:
    eviction = Eviction(policy=KeyDiff(), num_layers=10, shape=Pyramid())
    limit = Limit(shared_tokens=50, extra_tokens=14)
    layers = [eviction.layer_tokens(limit, n) for n in range(10)]
    assert sum(layers) == 640
    assert min(layers) == 14 + 2
    assert eviction.layer_tokens(Limit(shared_tokens=50), 9) == 2
    assert Uniform().layer_tokens(50, 0, 9, 10) == 50
