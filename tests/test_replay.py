"""The replay oracle holds for every policy on every architecture, while reading and writing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kvarena.harness.engine import Engine, Generation, KeptTokens
from kvarena.harness.registry import build, choices, load_choice
from kvarena.harness.testing.oracle import replay_difference
from toys import ARCHITECTURES, kernel_for, toy_model, toy_prompt

BUDGET, CHUNK, NEW_TOKENS = 64, 24, 72
PROMPT_LENGTHS = (200, 151, 97)

# Every policy is built here, and some of them read a file.
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


def difference(
    engine: Engine,
    prompt: list[int],
    generation: Generation,
    held: Sequence[KeptTokens] | None = None,
) -> float:
    """Of the engine's logits to those of the oracle, for what it held or for other claims."""
    uses_ranks = engine.policy.needs.rank_positions
    return replay_difference(
        engine.model,
        prompt + generation.token_ids[:-1],
        generation.kept_history if held is None else held,
        generation.logits,
        num_rank_sinks=engine.policy.sinks if uses_ranks else None,
    )


@pytest.mark.parametrize("policy_name", choices("policy"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_equals_a_full_cache_that_hides_the_evicted(
    architecture: str, policy_name: str
) -> None:
    engine, prompts, generations = generate(architecture, policy_name)
    for prompt, generation in zip(prompts, generations, strict=True):
        assert difference(engine, prompt, generation) < 2e-4
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
        assert difference(engine, prompt, generation) < 2e-4


def with_first_chunk_in_one_head(step: KeptTokens) -> KeptTokens:
    """As if one head of one layer had never evicted the first chunk, and held so many more."""
    held = [list(layer) for layer in step.positions]
    held[1][0] = torch.cat([held[1][0], torch.arange(CHUNK)]).unique()
    return replace(step, positions=held)


@pytest.mark.parametrize("policy_name", ["keydiff", "h2o"])
def test_oracle_notices_one_head_that_held_other_tokens(policy_name: str) -> None:
    engine, prompts, generations = generate("llama", policy_name)
    prompt, generation = prompts[0], generations[0]
    other = [with_first_chunk_in_one_head(step) for step in generation.kept_history]
    assert difference(engine, prompt, generation, other) > 1e-2


@pytest.mark.parametrize(("reindex", "num_rank_sinks"), [(True, None), (False, 4)])
def test_oracle_notices_positions_of_another_kind(
    reindex: bool, num_rank_sinks: int | None
) -> None:
    """Ranks told as original positions, and the other way round."""
    policy = build({**load_choice("policy", "streaming_llm"), "reindex": reindex})
    engine = Engine(toy_model(), policy, budget_tokens=BUDGET, chunk_tokens=CHUNK, slots=1)
    prompt = toy_prompt(150)
    (generation,) = engine.generate(
        [prompt], max_new_tokens=9, record_history=True, record_logits="all"
    )
    differing = replay_difference(
        engine.model,
        prompt + generation.token_ids[:-1],
        generation.kept_history,
        generation.logits,
        num_rank_sinks=num_rank_sinks,
    )
    assert differing > 1e-2


@dataclass
class Claim:
    """What another eviction engine may say, with heads that hold different numbers of tokens."""

    seen_tokens: int
    positions: list[list[Tensor]]


def test_heads_may_hold_different_numbers_of_tokens() -> None:
    """Against a plain pass over the text, which nothing was evicted from before its last token."""
    model, text = toy_model(), toy_prompt(20)
    everything = [[torch.arange(19), torch.arange(19)] for _ in range(3)]
    with torch.inference_mode():
        plain = model(torch.tensor([text])).logits[0]
    held = [Claim(19, everything), Claim(20, everything)]
    assert replay_difference(model, text, held, plain) < 2e-4
    for fewer in everything:
        fewer[1] = fewer[1][10:]
    assert replay_difference(model, text, held, plain) > 1e-2


def test_claims_that_cannot_have_been_are_refused() -> None:
    engine, prompts, (generation, *_) = generate("llama", "keydiff")
    with pytest.raises(ValueError, match="have seen 270 tokens, not the 271 of the text"):
        difference(engine, prompts[0], generation, generation.kept_history[:-1])
    token_ids = prompts[0] + generation.token_ids[:-1]
    with pytest.raises(ValueError, match="ranks as positions need the first 4 tokens and an unbro"):
        replay_difference(
            engine.model, token_ids, generation.kept_history, generation.logits, num_rank_sinks=4
        )


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
