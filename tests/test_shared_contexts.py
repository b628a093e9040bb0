"""Contexts that are read once for many questions, and dialogues: right numbers, nothing shared."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvarena.harness.engine import Engine, Generation, Request
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import build, choices, load_choice
from kvarena.harness.testing.oracle import replay_difference
from kvarena.policies.base import LayerView
from kvarena.policies.keydiff import KeyDiff
from toys import toy_model, toy_prompt

BUDGET, CHUNK, NEW_TOKENS = 64, 24, 20
POLICIES = choices("policy")
# One of each kind of what travels with a slot: a column, norms, last queries, statistics of all.
SIDE_STATES = ["h2o", "critical", "r_kv", "expected_attention"]
ANSWERS_DECIDE = ["oracle"]  # nothing can be shared between its questions
CONTEXTS = {"a": toy_prompt(170), "b": toy_prompt(97, seed=1)}
QUESTIONS = [("a", 7), ("b", 3), ("a", 1), ("a", 12), ("b", 9), ("a", 5)]

# Every policy is built here, and one of them reads trained heads.
pytestmark = pytest.mark.usefixtures("toy_heads")


def asked(**options: Any) -> list[Request]:
    """Four questions of one context and two of another, in turn, and a prompt of its own."""
    requests = [
        Request(
            prompt=CONTEXTS[name] + toy_prompt(length, seed=10 + index),
            question_tokens=length,
            context=name,
            max_new_tokens=NEW_TOKENS - index,
            **options,
        )
        for index, (name, length) in enumerate(QUESTIONS)
    ]
    return [*requests, Request(prompt=toy_prompt(80, seed=3), max_new_tokens=NEW_TOKENS)]


def engine_for(policy: str = "keydiff", **options: Any) -> Engine:
    settings = load_choice("policy", policy)
    named = {name: build(load_choice(name, options.pop(name))) for name in ("shape", "codec")
             if name in options}  # fmt: skip
    if policy == "streaming_llm" and "shape" in named:
        settings["reindex"] = False
    model = options.pop("model", None) or toy_model(dtype=torch.float64)
    return Engine(
        model,
        build(settings),
        **{"budget_tokens": BUDGET, "chunk_tokens": CHUNK, "slots": 3} | named | options,
    )


def generate(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    return list(engine.generate(requests, record_history=True, record_logits="all"))


def one_by_one(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Each by itself, with the room that the longest question of its context needs."""
    room = {name: max(n for own, n in QUESTIONS if own == name) for name in CONTEXTS}
    return [
        generate(engine, [replace(one, room_tokens=room[one.context] if one.context else 0)])[0]
        for one in requests
    ]


def assert_same(one: Generation, other: Generation) -> None:
    assert one.token_ids == other.token_ids
    assert (one.prompt_tokens, one.kept_tokens) == (other.prompt_tokens, other.kept_tokens)
    assert (one.kv_bytes_kept, one.kv_bytes_peak) == (other.kv_bytes_kept, other.kv_bytes_peak)
    assert one.kept_history
    assert other.kept_history
    for mine, theirs in zip(one.kept_history, other.kept_history, strict=True):
        for layer, other_layer in zip(mine.positions, theirs.positions, strict=True):
            assert all(map(torch.equal, layer, other_layer))


def difference(engine: Engine, text: list[int], generation: Generation) -> float:
    ranks = engine.policy.needs.rank_positions
    return replay_difference(
        engine.model,
        text,
        generation.kept_history,
        generation.logits,
        num_rank_sinks=engine.eviction.sinks if ranks else None,
    )


# ---- one context, many questions ----


@pytest.mark.parametrize(
    ("policy", "shape"),
    [(policy, "uniform") for policy in POLICIES] + [(policy, "ada") for policy in SIDE_STATES],
)
def test_shared_questions_are_answered_as_each_by_itself(policy: str, shape: str) -> None:
    engine = engine_for(policy, **({} if policy == "full" else {"shape": shape}))
    requests = asked()
    together = generate(engine, requests)
    for request, one, alone in zip(requests, together, one_by_one(engine, requests), strict=True):
        assert_same(one, alone)
        assert difference(engine, [*request.prompt, *one.token_ids[:-1]], one) < 1e-9


@pytest.mark.parametrize("codec", [name for name in choices("codec") if name != "none"])
@pytest.mark.parametrize("shape", ["uniform", "global"])
def test_coded_contexts_are_shared_without_a_trace(codec: str, shape: str) -> None:
    model = toy_model(dtype=torch.float32)
    engine = engine_for("h2o", codec=codec, shape=shape, model=model)
    requests = asked()
    together = generate(engine, requests)
    for one, alone in zip(together, one_by_one(engine, requests), strict=True):
        assert_same(one, alone)
        torch.testing.assert_close(one.logits, alone.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_order_and_slots_change_nothing(slots: int) -> None:
    requests = asked()
    expected = generate(engine_for("snapkv"), requests)
    order = [3, 6, 1, 0, 5, 4, 2]
    moved = generate(engine_for("snapkv", slots=slots), [requests[index] for index in order])
    for one, index in zip(moved, order, strict=True):
        assert_same(one, expected[index])


@pytest.mark.parametrize("policy", [*SIDE_STATES, "full", "streaming_llm", "kvzip"])
def test_a_context_is_computed_once(policy: str) -> None:
    requests = asked()
    together = list(engine_for(policy).generate(requests))
    contexts = sum(map(len, CONTEXTS.values()))
    expected = contexts + sum(length for _, length in QUESTIONS) + len(requests[-1].prompt)
    assert sum(one.prefill_tokens for one in together) == expected
    assert [one.prompt_tokens for one in together] == [len(one.prompt) for one in requests]


@pytest.mark.parametrize("policy", ANSWERS_DECIDE)
def test_what_the_answers_decide_is_computed_for_each(policy: str) -> None:
    for one in engine_for(policy).generate(asked()):
        assert one.prefill_tokens == one.prompt_tokens


@pytest.mark.parametrize("shape", ["uniform", "ada", "global"])
def test_a_shared_context_takes_one_copy_per_slot_and_no_more(shape: str) -> None:
    engine = engine_for("h2o", shape=shape)
    batch = engine.batch(asked())
    model = engine.model.config
    widths = 2 * model.head_dim * 8 + 4 + 4  # keys, values, position and one column
    most = model.num_hidden_layers * model.num_key_value_heads * (BUDGET + CHUNK) * widths
    while batch.has_work:
        batch.step()
        assert batch.kv_bytes_allocated <= 3 * most
    assert len(batch.slots) == 3


def test_a_context_and_its_longest_question_stay_within_the_budget() -> None:
    for one in generate(engine_for("keydiff"), asked()[:6]):
        assert one.kept_history
        for step in one.kept_history:
            assert step.stacked.shape[-1] <= BUDGET
        at_the_question = one.kept_history[7 if one.prompt_tokens > 120 else 4]
        assert at_the_question.stacked.shape[-1] <= BUDGET


def test_scores_that_are_no_numbers_in_a_context_end_all_its_questions() -> None:
    class Broken(KeyDiff):
        def score(self, view: LayerView) -> torch.Tensor:
            scores = super().score(view)
            is_context_b = view.positions.amax(dim=(1, 2)) < 100
            return scores.masked_fill(is_context_b[:, None, None], float("nan"))

    engine = Engine(toy_model(), Broken(), budget_tokens=BUDGET, chunk_tokens=CHUNK, slots=3)
    requests = [one for one in asked() if one.context == "b"]
    for one in engine.generate(requests):
        assert one.finish_reason == "invalid"
        assert one.error
        assert "Broken" in one.error


# ---- dialogues ----


def dialogue(context: str | None = None) -> list[Request]:
    """A prompt, and two more turns; another dialogue of two turns is between them."""
    first = {"context": context, "question_tokens": 7 if context else 0}
    return [
        Request(prompt=toy_prompt(150), max_new_tokens=12, **first),
        Request(prompt=toy_prompt(60, seed=5), max_new_tokens=30),
        Request(prompt=toy_prompt(40, seed=6), max_new_tokens=15, continues=0),
        Request(prompt=toy_prompt(9, seed=7), max_new_tokens=8, continues=1),
        Request(prompt=toy_prompt(11, seed=8), max_new_tokens=10, continues=2),
    ]


TURNS = [[0, 2, 4], [1, 3]]


def text_until(requests: Sequence[Request], done: Sequence[Generation], turns: list[int]) -> Any:
    """All that is fed up to the end of the last of these turns."""
    text: list[int] = []
    for turn in turns:
        text += [*requests[turn].prompt, *done[turn].token_ids]
    return text[:-1]


@pytest.mark.parametrize(
    ("policy", "shape", "evict_every"),
    [(policy, "uniform", 1) for policy in (*SIDE_STATES, "snapkv", "streaming_llm", "kvzip")]
    + [("h2o", shape, every) for shape in ("ada", "global", "pyramid") for every in (1, 9)]
    + [("r_kv", "ada", 9), ("expected_attention", "global", 9), ("snapkv", "uniform", 9)],
)
def test_a_dialogue_goes_on_with_what_it_holds(policy: str, shape: str, evict_every: int) -> None:
    engine = engine_for(policy, shape=shape, evict_every=evict_every)
    for context in (None, "a"):
        requests = dialogue(context)
        done = generate(engine, requests)
        for turns in TURNS:
            for upto in range(1, len(turns) + 1):
                text, last = text_until(requests, done, turns[:upto]), done[turns[upto - 1]]
                assert last.prompt_tokens + len(last.token_ids) - 1 == len(text)
                assert difference(engine, text, last) < 1e-9
                assert last.kept_tokens <= BUDGET + evict_every - 1


def test_a_dialogue_with_the_full_cache_answers_as_to_its_whole_text() -> None:
    engine = engine_for("full", budget_tokens=None)
    requests = dialogue()
    done = generate(engine, requests)
    whole = [*requests[0].prompt, *done[0].token_ids, *requests[2].prompt]
    (fresh,) = engine.generate([Request(prompt=whole, max_new_tokens=15)])
    assert fresh.token_ids == done[2].token_ids
    assert done[2].prefill_tokens == len(requests[2].prompt) + 1  # the last token of the answer


def test_a_stop_token_is_not_part_of_the_next_turn_s_text() -> None:
    engine = engine_for("full", budget_tokens=None)
    plain, *_ = generate(engine, dialogue())
    stop = plain.token_ids[4]
    first = replace(dialogue()[0], stop_token_ids={stop})
    done = list(engine.generate([first, replace(dialogue()[2], continues=0)]))
    assert done[0].finish_reason == "stop"
    num_answer = done[0].token_ids.index(stop)
    assert done[1].prompt_tokens == 150 + num_answer + 40


@pytest.mark.parametrize("codec", [name for name in choices("codec") if name != "none"])
def test_coded_dialogues_are_the_same_alone_and_among_others(codec: str) -> None:
    engine = engine_for("keydiff", codec=codec, model=toy_model())
    requests = dialogue()
    done = generate(engine, requests)
    alone = generate(
        engine, [requests[0], replace(requests[2], continues=0), replace(requests[4], continues=1)]
    )
    for one, other in zip([done[0], done[2], done[4]], alone, strict=True):
        assert_same(one, other)


def test_an_invalid_turn_ends_the_dialogue() -> None:
    model = toy_model(seed=1)
    engine = Engine(model, KeyDiff(), budget_tokens=BUDGET, chunk_tokens=CHUNK)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    first, second = engine.generate([dialogue()[0], replace(dialogue()[2], continues=0)])
    assert first.finish_reason == second.finish_reason == "invalid"
    assert second.error
    assert "earlier turn" in second.error


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": toy_prompt(170, seed=9)}, "'a', but differ in its text"),
        ({"budget_tokens": 50}, "'a', but differ in its text or in their budget"),
        ({"question_tokens": 0}, "a question of 0; both need at least one"),
        ({"room_tokens": 64}, "leaves nothing to choose"),
    ],
)
def test_questions_that_cannot_share_are_refused(change: dict, message: str) -> None:
    first, *others = asked()
    with pytest.raises(UsageError, match=message):
        engine_for().batch([*others, replace(first, **change)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "is an empty turn"),
        ({"continues": 2}, "request 2 continues 2, which is not one before it"),
        ({"continues": 7}, "request 2 continues 7"),
        ({"budget_tokens": 50}, "leave out context, question_tokens"),
        ({"question_tokens": 3}, "leave out context, question_tokens"),
    ],
)
def test_turns_that_cannot_follow_are_refused(change: dict, message: str) -> None:
    first, other, turn, *_ = dialogue()
    with pytest.raises(UsageError, match=message):
        engine_for().batch([first, other, replace(turn, **change)])


def test_a_turn_has_one_next_turn() -> None:
    first, _, turn, *_ = dialogue()
    with pytest.raises(UsageError, match="a dialogue has one next turn"):
        engine_for().batch([first, turn, turn])


def test_a_reference_that_must_know_the_answer_takes_no_part_in_a_dialogue() -> None:
    with pytest.raises(UsageError, match="turns=independent"):
        engine_for("oracle").batch(dialogue())


def test_a_dialogue_beyond_the_context_is_refused() -> None:
    model = toy_model()
    most = model.config.max_position_embeddings
    turn = Request(prompt=toy_prompt(20), max_new_tokens=10, continues=0)
    with pytest.raises(UsageError, match="prompt 1"):
        engine_for(model=model).batch(
            [Request(prompt=toy_prompt(most - 40), max_new_tokens=20), turn]
        )
