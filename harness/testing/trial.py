"""A trial of a policy: a toy model, prompts and a budget, its answers, and how two compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from kvarena.harness.engine import Engine, Generation, KeptTokens
from kvarena.harness.testing.faults import ContractError
from kvarena.harness.testing.score_calls import Call, Watch
from kvarena.harness.testing.toy_models import toy_model, toy_prompt
from kvarena.policies.base import Policy

CHUNK_TOKENS = 24
NEW_TOKENS = 16
# The heads of the default model, so that weights trained for it fit; its layers are not needed.
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
_LEAST_BUDGET, _MOST_BUDGET = 64, 512
_LEAST_CHOICE = 16  # tokens that a policy must be able to choose under the budget of the checks


class Make(Protocol):
    """Builds the policy anew, with other values for some of its options."""

    def __call__(self, **options: Any) -> Policy: ...  # Any: whatever an option holds


@dataclass(frozen=True)
class Trial:
    """The policy under test, and what several checks share."""

    make: Make

    @cached_property
    def model(self) -> Any:  # Any: transformers is not typed
        return toy_model(
            dtype=torch.float64,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            hidden_size=72,
        )

    @cached_property
    def budget_tokens(self) -> int:
        """The smallest that leaves the policy something to choose."""
        budget, policy = _LEAST_BUDGET, self.make()
        while budget - policy.sinks - policy.num_recent(budget) < _LEAST_CHOICE:
            budget *= 2
            if budget > _MOST_BUDGET:
                raise ContractError(
                    f"of a budget of {_MOST_BUDGET} tokens, sinks and num_recent protect "
                    f"{policy.sinks} + {policy.num_recent(_MOST_BUDGET)}",
                    f"at least {_LEAST_CHOICE} tokens left to choose",
                    "num_recent",
                )
        return budget

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Three of equal length, which are scored side by side, a short one and a longer one.

        The longest begins with the first, and whole chunks are between them.
        """
        length = -(-3 * self.budget_tokens // CHUNK_TOKENS) * CHUNK_TOKENS
        same = [toy_prompt(length, seed=seed) for seed in range(3)]
        longer = same[0] + toy_prompt(2 * CHUNK_TOKENS, seed=3)
        return [*same, toy_prompt(self.budget_tokens // 2, seed=4), longer]

    def engine(self, policy: Policy, slots: int = 1) -> Engine:
        """Of the toy model, under the budget."""
        return Engine(
            self.model,
            policy,
            budget_tokens=self.budget_tokens,
            chunk_tokens=CHUNK_TOKENS,
            slots=slots,
        )

    def run(self, policy: Policy, prompts: Sequence[list[int]], slots: int = 1) -> list[Generation]:
        """With what each head held after every pass."""
        generations = self.engine(policy, slots).generate(
            prompts, max_new_tokens=NEW_TOKENS, record_history=True
        )
        return list(generations)

    @cached_property
    def alone(self) -> list[Generation]:
        """Each prompt by itself, each time with a policy that has seen nothing else."""
        return [self.run(self.make(), [prompt])[0] for prompt in self.prompts]

    @cached_property
    def calls(self) -> list[Call]:
        """Of ``score`` while two prompts of equal length are read and answered side by side."""
        watch = Watch(self.make())
        try:
            generations = self.engine(watch.policy, slots=2).generate(
                self.prompts[:2], max_new_tokens=NEW_TOKENS, on_pass=watch.count_pass
            )
            for _ in generations:
                pass
        except Exception as error:
            if watch.fault:
                raise watch.fault from None
            error.add_note(watch.where)
            raise
        return watch.calls


def history(generation: Generation) -> list[KeptTokens]:
    """What was held after every pass, of a run that recorded it."""
    assert generation.kept_history is not None
    return generation.kept_history


def unlike(one: Generation, other: Generation) -> str | None:
    """What the other kept or answered that the one did not, or None."""
    for before, after in zip(history(one), history(other), strict=True):
        seen = unlike_steps(before, after)
        if seen:
            return seen
    return None if one.token_ids == other.token_ids else "was answered differently"


def unlike_steps(one: KeptTokens, other: KeptTokens) -> str | None:
    """The first head that held other tokens after one pass, or None."""
    for layer, (before, after) in enumerate(zip(one.positions, other.positions, strict=True)):
        for head, (kept, others) in enumerate(zip(before, after, strict=True)):
            num_other = len(set(others.tolist()) - set(kept.tolist()))
            if num_other:
                return (
                    f"kept {num_other} other tokens of {len(kept)} in head {head} of layer {layer}"
                )
    return None
