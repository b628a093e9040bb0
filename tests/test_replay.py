"""The replay oracle holds for every policy on every architecture, while reading and writing."""

import pytest
import torch

from kvarena.harness.engine import Engine, Generation
from kvarena.harness.registry import build, choices, load_choice
from oracle import rank_shifts, replay, seen_by_each_query
from toys import ARCHITECTURES, kernel_for, toy_model, toy_prompt

BUDGET, CHUNK, NEW_TOKENS = 64, 24, 72
PROMPT_LENGTHS = (200, 151, 97)

# Every policy is built here, and one of them reads trained heads.
pytestmark = pytest.mark.usefixtures("toy_heads")


def generate(
    architecture: str, policy_name: str, budget: int = BUDGET
) -> tuple[Engine, list[list[int]], list[Generation]]:
    policy = build(load_choice("policy", policy_name))
    engine = Engine(
        toy_model(architecture),
        policy,
        budget_tokens=budget,
        chunk_tokens=CHUNK,
        slots=2,
        attention=kernel_for(architecture),
    )
    prompts = [toy_prompt(length, seed=length) for length in PROMPT_LENGTHS]
    generations = list(
        engine.generate(
            prompts, max_new_tokens=NEW_TOKENS, record_history=True, record_logits="all"
        )
    )
    return engine, prompts, generations


def replayed(
    engine: Engine, prompt: list[int], generation: Generation, masks: list
) -> torch.Tensor:
    token_ids = prompt + generation.token_ids[:-1]
    uses_ranks = engine.policy.needs.rank_positions
    return replay(
        engine.model,
        token_ids,
        masks,
        sink_shifts=rank_shifts(generation, len(token_ids)) if uses_ranks else None,
        num_sinks=engine.policy.sinks,
    )


@pytest.mark.parametrize("policy_name", choices("policy"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_equals_a_full_cache_that_hides_the_evicted(
    architecture: str, policy_name: str
) -> None:
    engine, prompts, generations = generate(architecture, policy_name)
    for prompt, generation in zip(prompts, generations, strict=True):
        masks = seen_by_each_query(generation, len(prompt) + NEW_TOKENS - 1)
        expected = replayed(engine, prompt, generation, masks)
        assert (generation.logits - expected).abs().max() < 2e-4
        if engine.policy.evicts:
            evicting = [
                before
                for before, after in zip(
                    generation.kept_history, generation.kept_history[1:], strict=False
                )
                if before.positions[0].shape[1] == BUDGET == after.positions[0].shape[1]
            ]
            assert len(evicting) >= 64


@pytest.mark.parametrize("policy_name", choices("policy"))
def test_a_budget_under_the_sliding_window_hides_exactly_what_was_evicted(policy_name: str) -> None:
    """Mistral's window of 48 is wider than the budget, so evicted tokens would still be in sight.

    With ranks as positions (StreamingLLM) the sinks are moved into the window and must be seen.
    """
    engine, prompts, generations = generate("mistral", policy_name, budget=40)
    for prompt, generation in zip(prompts, generations, strict=True):
        masks = seen_by_each_query(generation, len(prompt) + NEW_TOKENS - 1)
        expected = replayed(engine, prompt, generation, masks)
        assert (generation.logits - expected).abs().max() < 2e-4


@pytest.mark.parametrize("policy_name", ["keydiff", "h2o"])
def test_oracle_notices_one_corrupted_mask(policy_name: str) -> None:
    engine, prompts, generations = generate("llama", policy_name)
    prompt, generation = prompts[0], generations[0]
    masks = seen_by_each_query(generation, len(prompt) + NEW_TOKENS - 1)
    # One head of one layer sees the first chunk for good, as if it had never been evicted.
    masks[1][0, CHUNK:, :CHUNK] = True
    wrong = replayed(engine, prompt, generation, masks)
    assert (generation.logits - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("chunk_tokens", [16, 1000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_cache_writes_what_generate_writes(architecture: str, chunk_tokens: int) -> None:
    model = toy_model(architecture)
    prompts = [toy_prompt(length, seed=length) for length in (130, 61)]
    engine = Engine(
        model,
        build(load_choice("policy", "full")),
        chunk_tokens=chunk_tokens,
        attention=kernel_for(architecture),
    )
    for prompt, generation in zip(
        prompts, engine.generate(prompts, max_new_tokens=32), strict=True
    ):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)
        assert generation.token_ids == expected[0, len(prompt) :].tolist()
