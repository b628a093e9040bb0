"""References: what the full cache's look ahead says of each token, and that it travels with it."""

import pytest
import torch

from kvarena.harness.engine import Engine, Generation, Request
from kvarena.harness.registry import build, load_choice
from kvarena.policies.base import TOKEN_SCORE
from toys import finished, kernel_for, toy_model, toy_prompt

PROMPT, NEW = toy_prompt(90), 12


def engine(policy: str = "oracle", **options: object) -> Engine:
    return Engine(
        toy_model(dtype=torch.float64),
        build(load_choice("policy", policy)),
        **{"budget_tokens": 40, "chunk_tokens": 16, "slots": 2} | options,
    )


def weights(tokens: list[int]) -> torch.Tensor:
    """[L, H, N, N] of one full pass of the untouched model."""
    model = toy_model(dtype=torch.float64)
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        with torch.inference_mode():
            found = model(torch.tensor([tokens]), output_attentions=True).attentions
    finally:
        model.config._attn_implementation = before
    return torch.cat(found)


def run(policy: str, **options: object) -> tuple[list[torch.Tensor], Generation]:
    """What its cache says of each token at the end, [K, N] per layer, NaN for what is gone."""
    batch = engine(policy, slots=1, **options).batch(
        [Request(prompt=PROMPT, max_new_tokens=NEW)], record_history=True
    )
    (generation,) = finished(batch)
    found = []
    for layer in batch.layers:
        slots = slice(0, 1)
        num = layer.num_tokens(slots)
        positions = layer.positions[0, :, :num].long()
        known = torch.full((len(positions), len(PROMPT) + NEW), float("nan"), dtype=torch.float64)
        known.scatter_(1, positions, layer.columns(slots, num)[TOKEN_SCORE][0].double())
        found.append(known)
    return found, generation


def test_the_oracle_s_scores_are_the_attention_of_the_full_cache_s_own_answer() -> None:
    (full,) = engine("full").generate([PROMPT], max_new_tokens=NEW)
    fed = PROMPT + full.token_ids[:-1]
    told, _ = run("oracle", budget_tokens=40)
    for layer, attention in zip(told, weights(fed), strict=True):
        of_group = attention.unflatten(0, (2, -1)).sum(dim=1)  # [K, N, N]
        expected = of_group[:, len(PROMPT) - 1 :].sum(dim=1)
        is_held = ~layer[:, : len(fed)].isnan()
        assert is_held.sum() == 2 * 40
        torch.testing.assert_close(
            layer[:, : len(fed)][is_held], expected[is_held], rtol=1e-4, atol=1e-6
        )


def test_kvzip_s_scores_are_the_most_attention_of_the_prompt_read_again() -> None:
    told, _ = run("kvzip", budget_tokens=200)  # nothing is evicted, so all can be compared
    for layer, attention in zip(told, weights(PROMPT + PROMPT), strict=True):
        of_group = attention.unflatten(0, (2, -1)).amax(dim=1)
        expected = of_group[:, len(PROMPT) :, : len(PROMPT)].amax(dim=1)
        torch.testing.assert_close(layer[:, : len(PROMPT)], expected, rtol=1e-4, atol=1e-6)
        answer = layer[:, len(PROMPT) : len(PROMPT) + NEW - 1]
        torch.testing.assert_close(answer, expected.amax(dim=1)[:, None].expand_as(answer))


def test_the_oracle_keeps_what_is_looked_at_most() -> None:
    """At the end of the prompt, the best of each head among those that came through the chunks."""
    (generation,) = engine("oracle", chunk_tokens=90, slots=1).generate(
        [Request(prompt=PROMPT, max_new_tokens=NEW)], record_history=True
    )
    (full,) = engine("full").generate([PROMPT], max_new_tokens=NEW)
    after_prompt = generation.kept_history[0]
    for held, attention in zip(
        after_prompt.positions, weights(PROMPT + full.token_ids[:-1]), strict=True
    ):
        mass = attention.unflatten(0, (2, -1)).sum(dim=1)[:, len(PROMPT) - 1 :].sum(dim=1)
        best = mass[:, : len(PROMPT)].topk(40).indices.sort(dim=-1).values
        assert torch.equal(held, best)


def test_a_forced_answer_is_the_one_it_looks_ahead_to() -> None:
    forced = toy_prompt(NEW, seed=9)
    request = Request(prompt=PROMPT, forced=forced)
    batch = engine(budget_tokens=200, slots=1).batch([request])
    finished(batch)
    layer = batch.layers[0]
    told = layer.columns(slice(0, 1), layer.num_tokens(slice(0, 1)))[TOKEN_SCORE][0]
    attention = weights(PROMPT + forced[:-1])[0].unflatten(0, (2, -1)).sum(dim=1)
    expected = attention[:, len(PROMPT) - 1 :].sum(dim=1)
    torch.testing.assert_close(told.double(), expected, rtol=1e-4, atol=1e-6)


def test_scores_that_are_given_are_taken_and_nothing_is_read_first() -> None:
    model = toy_model(dtype=torch.float64)
    given = torch.zeros(model.config.num_hidden_layers, 2, len(PROMPT) + NEW)
    given[:, :, :30] = 1
    request = Request(prompt=PROMPT, max_new_tokens=NEW, token_scores=given)
    (generation,) = engine(slots=1).generate([request], record_kept=True)
    for layer in generation.kept_positions:
        assert all(set(range(30)) <= set(head.tolist()) for head in layer)


@pytest.mark.parametrize("shape", ["ada", "global"])
def test_references_go_with_every_shape(shape: str) -> None:
    generations = engine(shape=build(load_choice("shape", shape))).generate(
        [PROMPT, toy_prompt(50, seed=4)], max_new_tokens=NEW
    )
    assert [len(generation.token_ids) for generation in generations] == [NEW, NEW]


def test_kvzip_refuses_a_prompt_that_does_not_fit_twice() -> None:
    model = toy_model(max_position_embeddings=150)
    zipped = Engine(
        model,
        build(load_choice("policy", "kvzip")),
        budget_tokens=40,
        attention=kernel_for("llama"),
    )
    with pytest.raises(Exception, match="prompt 0, read twice, has 180 tokens"):
        zipped.batch([PROMPT], max_new_tokens=4)
