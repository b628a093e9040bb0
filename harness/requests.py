"""From what a caller asks of the engine to checked sequences, before any work is done."""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import Any

import torch
from transformers import PreTrainedModel

from kvarena.harness.errors import UsageError
from kvarena.harness.models import context_tokens
from kvarena.harness.sequence import Sequence
from kvarena.policies.base import Policy

StopTokens = Collection[int] | Seq[Collection[int]] | None


def check_budget(policy: Policy, budget_tokens: int | None, question_tokens: int = 0) -> None:
    """Raise UsageError if the budget leaves the policy nothing to choose."""
    if budget_tokens is None or not policy.evicts:
        return
    for_context = budget_tokens - question_tokens
    protected = policy.sinks + policy.num_recent(for_context)
    if for_context <= protected:
        held_back = f" beside a question of {question_tokens}" if question_tokens else ""
        raise UsageError(
            f"a budget of {budget_tokens} tokens{held_back} leaves nothing to choose: {protected} "
            "tokens are protected (sinks and recent); raise the budget or protect fewer"
        )


def check_context(
    name: str,
    prompt_tokens: int,
    max_new_tokens: int,
    limit_tokens: int | None,
    advice: str = "use shorter prompts or fewer new tokens",
) -> None:
    """Raise UsageError, with the advice, if prompt and answer do not fit the model's context."""
    needed = prompt_tokens + max_new_tokens
    if limit_tokens is not None and needed > limit_tokens:
        raise UsageError(
            f"{name} has {prompt_tokens} tokens, with {max_new_tokens} new ones {needed}: over the "
            f"model's context of {limit_tokens}; {advice}"
        )


def plan_sequences(
    model: PreTrainedModel,
    policy: Policy,
    prompts: Seq[Seq[int]],
    *,
    max_new_tokens: int | Seq[int],
    budgets: int | Seq[int | None] | None,
    seeds: int | Seq[int],
    stop_token_ids: StopTokens,
    min_new_tokens: int | Seq[int] = 0,
    question_tokens: int | Seq[int] = 0,
    forced: Seq[Seq[int]] | None = None,
) -> list[Sequence]:
    """One sequence per prompt; a single value stands for all prompts. Raises UsageError."""
    lengths = _per_prompt("max_new_tokens", max_new_tokens, len(prompts))
    limits = _per_prompt("budgets", budgets, len(prompts))
    seed_list = _per_prompt("seeds", seeds, len(prompts))
    stops = _stop_sets(model, stop_token_ids, len(prompts))
    minima = _per_prompt("min_new_tokens", min_new_tokens, len(prompts))
    answers = _per_prompt("forced", forced, len(prompts))
    questions = _per_prompt("question_tokens", question_tokens, len(prompts))
    sequences = []
    for index, prompt in enumerate(prompts):
        token_ids = [int(token) for token in prompt] or [_bos_token(model)]
        if answers[index] is not None and not answers[index]:
            raise UsageError(f"forced answer {index} is empty; it needs at least one token")
        if lengths[index] < 1:
            raise UsageError(f"max_new_tokens must be >= 1, got {lengths[index]}")
        if not 0 <= questions[index] <= len(token_ids):
            raise UsageError(
                f"question_tokens is {questions[index]} of a prompt of {len(token_ids)}"
            )
        check_budget(policy, limits[index], questions[index])
        check_context(
            f"prompt {index}", len(token_ids), lengths[index], context_tokens(model.config)
        )
        sequences.append(
            Sequence(
                index=index,
                prompt=token_ids,
                max_new_tokens=lengths[index],
                budget_tokens=limits[index] if policy.evicts else None,
                stop_token_ids=stops[index],
                question_tokens=questions[index],
                min_new_tokens=minima[index],
                forced=None if answers[index] is None else list(answers[index]),
                generator=torch.Generator().manual_seed(seed_list[index]),
            )
        )
    return sequences


def _per_prompt(name: str, value: int | Seq[Any] | None, num_prompts: int) -> list[Any]:
    """Any: entries are ints, or None for a budget without bound."""
    if value is None or isinstance(value, int):
        return [value] * num_prompts
    if len(value) != num_prompts:
        raise UsageError(f"{name} has {len(value)} entries for {num_prompts} prompts")
    return list(value)


def stop_tokens(model: PreTrainedModel) -> list[int]:
    """The model's own end-of-sequence tokens; none if it has none."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _stop_sets(model: PreTrainedModel, stop: StopTokens, num_prompts: int) -> list[frozenset[int]]:
    if stop is None:
        stop = stop_tokens(model)
    single = [token for token in stop if isinstance(token, int)]
    if len(single) == len(stop):
        return [frozenset(single)] * num_prompts
    per_prompt = [frozenset(tokens) for tokens in stop if not isinstance(tokens, int)]
    if len(per_prompt) != num_prompts:
        raise UsageError(f"stop_token_ids has {len(per_prompt)} entries for {num_prompts} prompts")
    return per_prompt


def _bos_token(model: PreTrainedModel) -> int:
    bos = model.generation_config.bos_token_id or model.config.get_text_config().bos_token_id
    if bos is None:
        raise UsageError("the prompt is empty and the model has no BOS token to start from")
    return int(bos)
