"""What a caller asks of the engine: one prompt, and everything about it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from kvarena.harness.engine.eviction import Eviction
from kvarena.harness.engine.limits import check_context, context_tokens
from kvarena.harness.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt. Either max_new_tokens or forced is given.

    prompt: token ids; an empty one starts from the model's BOS token.
    forced: an answer that is fed in place of the model's own (teacher forcing) and never stopped.
    budget_tokens: N of this prompt; None: the engine's own.
    question_tokens: last tokens of the prompt that the context is compressed without; context and
    question together stay in the budget.
    seed: of the generator that this prompt alone draws from, where sampling is not greedy.
    stop_token_ids: None: the model's own. min_new_tokens: no stop token before so many.
    token_scores: [L, K, tokens] of a policy that needs them (foresight.py); None: the engine looks
    ahead itself.
    """

    prompt: Sequence[int]
    max_new_tokens: int | None = None
    forced: Sequence[int] | None = None
    budget_tokens: int | None = None
    question_tokens: int = 0
    seed: int = 0
    stop_token_ids: Collection[int] | None = None
    min_new_tokens: int = 0
    token_scores: Tensor | None = None

    @property
    def answer_tokens(self) -> int:
        """Most tokens of the answer."""
        num = len(self.forced) if self.forced is not None else self.max_new_tokens
        assert num is not None, "one of the two is given"
        return num

    @property
    def context_tokens(self) -> int:
        """Tokens of the prompt before the question."""
        return len(self.prompt) - self.question_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens that are ever fed: the last one of the answer is not."""
        return len(self.prompt) + self.answer_tokens - 1


def settled(
    request: Request,
    index: int,
    model: PreTrainedModel,
    eviction: Eviction,
    budget_tokens: int | None,
) -> Request:
    """The request with all that it leaves to model, eviction and engine. Raises UsageError.

    index: what messages call it; budget_tokens: the engine's own.
    """
    prompt = [int(token) for token in request.prompt] or [_bos_token(model)]
    if (request.max_new_tokens is None) == (request.forced is None):
        raise UsageError("give either max_new_tokens or forced")
    if request.forced is not None and not request.forced:
        raise UsageError(f"forced answer {index} is empty; it needs at least one token")
    if request.answer_tokens < 1:
        raise UsageError(f"max_new_tokens must be >= 1, got {request.answer_tokens}")
    if not 0 <= request.question_tokens <= len(prompt):
        raise UsageError(
            f"question_tokens is {request.question_tokens} of a prompt of {len(prompt)}"
        )
    budget = budget_tokens if request.budget_tokens is None else request.budget_tokens
    eviction.check(budget, request.question_tokens)
    limit = context_tokens(model.config)
    check_context(f"prompt {index}", len(prompt), request.answer_tokens, limit)
    if eviction.policy.needs.token_scores == "repeat" and request.token_scores is None:
        check_context(f"prompt {index}, read twice,", 2 * len(prompt), 1, limit)
    stops = stop_tokens(model) if request.stop_token_ids is None else request.stop_token_ids
    return replace(
        request,
        prompt=prompt,
        budget_tokens=budget if eviction.policy.evicts else None,
        stop_token_ids=frozenset(stops),
    )


def stop_tokens(model: PreTrainedModel) -> list[int]:
    """The model's own end-of-sequence tokens; none if it has none."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _bos_token(model: PreTrainedModel) -> int:
    bos = model.generation_config.bos_token_id or model.config.get_text_config().bos_token_id
    if bos is None:
        raise UsageError("the prompt is empty and the model has no BOS token to start from")
    return int(bos)
