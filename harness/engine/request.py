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
    room_tokens: so many the context leaves room for if they are more than the question's.
    context: name of the context; requests with the same one have the same prompt but for their
    questions. It is read and compressed once, with room for the longest of their questions.
    continues: index of the request whose answer the prompt comes after, as the next turn of a
    dialogue: it goes on with what that one holds, under the same budget.
    tokens_before: most tokens fed before those of the prompt; known once it is settled.
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
    room_tokens: int = 0
    context: str | None = None
    continues: int | None = None
    tokens_before: int = 0
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
    def held_back_tokens(self) -> int:
        """What the context leaves room for."""
        return max(self.question_tokens, self.room_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens that are ever fed: the last one of the answer is not."""
        return self.tokens_before + len(self.prompt) + self.answer_tokens - 1


def settled(
    requests: Sequence[Request],
    model: PreTrainedModel,
    eviction: Eviction,
    budget_tokens: int | None,
) -> list[Request]:
    """The requests with all that they leave to model, eviction and engine. Raises UsageError.

    budget_tokens: the engine's own.
    """
    done: list[Request] = []
    for index, request in enumerate(requests):
        if request.continues is not None:
            request = _after(request, index, done, eviction)
        done.append(_settled(request, index, model, eviction, budget_tokens))
    return _with_contexts(done, eviction)


def _settled(
    request: Request,
    index: int,
    model: PreTrainedModel,
    eviction: Eviction,
    budget_tokens: int | None,
) -> Request:
    """One of them; index: what messages call it."""
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
    eviction.check(budget, request.held_back_tokens)
    limit = context_tokens(model.config)
    num_prompt = request.tokens_before + len(prompt)
    check_context(f"prompt {index}", num_prompt, request.answer_tokens, limit)
    if eviction.policy.needs.token_scores == "repeat" and request.token_scores is None:
        check_context(f"prompt {index}, read twice,", 2 * num_prompt, 1, limit)
    stops = stop_tokens(model) if request.stop_token_ids is None else request.stop_token_ids
    return replace(
        request,
        prompt=prompt,
        budget_tokens=budget if eviction.policy.evicts else None,
        stop_token_ids=frozenset(stops),
    )


def _after(request: Request, index: int, done: Sequence[Request], eviction: Eviction) -> Request:
    """A later turn of a dialogue, with what it takes over from the turn before."""
    before = request.continues
    if before is None or not 0 <= before < index:
        raise UsageError(f"request {index} continues {before}, which is not one before it")
    if any(other.continues == before for other in done):
        raise UsageError(f"two requests continue request {before}; a dialogue has one next turn")
    if not request.prompt:
        raise UsageError(f"request {index} is an empty turn; it needs at least one token")
    if request.context is not None or request.held_back_tokens or request.budget_tokens is not None:
        raise UsageError(
            f"request {index} continues another one, whose context and budget it has; leave out "
            "context, question_tokens, room_tokens and budget_tokens"
        )
    if eviction.policy.needs.token_scores == "answer":
        raise UsageError(
            f"policy {type(eviction.policy).__name__} must know a request's answer beforehand, so "
            "it cannot take part in a dialogue; use turns=independent"
        )
    earlier = done[before]
    return replace(
        request,
        budget_tokens=earlier.budget_tokens,
        tokens_before=earlier.total_tokens + 1,
    )


def _with_contexts(requests: Sequence[Request], eviction: Eviction) -> list[Request]:
    """Those with a context leave as much room as the longest question of it needs."""
    by_context: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        if request.context is not None:
            by_context.setdefault(request.context, []).append(index)
    settled_ones = list(requests)
    for name, indices in by_context.items():
        members = [requests[index] for index in indices]
        first = members[0]
        for index, other in zip(indices, members, strict=True):
            if not other.context_tokens or not other.question_tokens:
                raise UsageError(
                    f"request {index} has {other.context_tokens} tokens of context {name!r} and a "
                    f"question of {other.question_tokens}; both need at least one"
                )
            if (
                other.prompt[: other.context_tokens] != first.prompt[: first.context_tokens]
                or other.budget_tokens != first.budget_tokens
            ):
                raise UsageError(
                    f"requests {indices[0]} and {index} are both said to ask of context {name!r}, "
                    "but differ in its text or in their budget; name them apart"
                )
        room = max(member.held_back_tokens for member in members)
        if eviction.policy.evicts:
            eviction.check(first.budget_tokens, room)
        # What each answer looks at decides such a policy's scores, so nothing can be shared.
        is_own = eviction.policy.needs.token_scores == "answer"
        for index in indices:
            settled_ones[index] = replace(
                requests[index], room_tokens=room, context=None if is_own else name
            )
    return settled_ones


def stop_tokens(model: PreTrainedModel) -> list[int]:
    """The model's own end-of-sequence tokens; none if it has none."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _bos_token(model: PreTrainedModel) -> int:
    bos = model.generation_config.bos_token_id or model.config.get_text_config().bos_token_id
    if bos is None:
        raise UsageError("the prompt is empty and the model has no BOS token to start from")
    return int(bos)
