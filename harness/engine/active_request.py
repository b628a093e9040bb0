"""A request on its way through a slot."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvarena.harness.engine.eviction import Limit
from kvarena.harness.engine.generation import KeptTokens
from kvarena.harness.engine.request import Request


@dataclass(kw_only=True)
class ActiveRequest:
    """How far a settled request is. What it holds now is counted by the layers' caches.

    num_seen: tokens fed to the model so far; prefill_tokens, has_evicted, kept_tokens,
    kv_bytes_kept, kv_bytes_peak: see Generation.
    """

    index: int
    request: Request
    generator: torch.Generator
    num_seen: int = 0
    prefill_tokens: int = 0
    kept_tokens: int = 0
    kv_bytes_kept: int = 0
    kv_bytes_peak: int = 0
    token_ids: list[int] = field(default_factory=list)
    history: list[KeptTokens] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    has_evicted: bool = False
    kernels: set[str] = field(default_factory=set)
    error: str | None = None

    def next_tokens(self, chunk_tokens: int) -> list[int]:
        """What goes into the next pass: a chunk of the prompt, or the newest token."""
        prompt, context_tokens = self.request.prompt, self.request.context_tokens
        if self.num_seen >= len(prompt):
            return self.token_ids[-1:]
        # No chunk may mix context and question. The short chunk comes first: a policy that asks the
        # last queries of a chunk (SnapKV, TOVA) then has a whole window of them at the end.
        end = context_tokens if self.num_seen < context_tokens else len(prompt)
        num_new = (end - self.num_seen) % chunk_tokens or chunk_tokens
        return list(prompt[self.num_seen : self.num_seen + num_new])

    def chooses_after(self, num_new: int) -> bool:
        """Whether a pass with ``num_new`` tokens ends in a choice of the next token."""
        return self.num_seen + num_new >= len(self.request.prompt)

    def limit_after(self, num_new: int, evict_every: int) -> Limit | None:
        """What to hold once a pass with ``num_new`` tokens has evicted, or None for no bound.

        The context is compressed to leave room for the question, whose tokens then evict nothing.
        """
        request = self.request
        if request.budget_tokens is None:
            return None
        reads_context = self.num_seen + num_new <= request.context_tokens
        room = request.held_back_tokens
        return Limit(
            shared_tokens=request.budget_tokens - room,
            extra_tokens=0 if reads_context else room,
            spare_tokens=evict_every - 1 if self.num_seen >= len(request.prompt) else 0,
        )

    def scores_of_next(self, num_new: int) -> Tensor | None:
        """[L, K, Q] of the tokens of the next pass, where the policy needs them.

        What nobody looked ahead to counts as much as the best token of its head.
        """
        known = self.request.token_scores
        if known is None:
            return None
        own = known[..., self.num_seen : self.num_seen + num_new]
        num_unknown = num_new - own.shape[-1]
        best = known.amax(dim=-1, keepdim=True).expand(*known.shape[:-1], num_unknown)
        return torch.cat([own, best], dim=-1) if num_unknown else own

    def add_token(self, token_id: int, now_sec: float) -> None:
        """Take a newly chosen token, or the one that is forced in its place."""
        if self.request.forced is not None:
            token_id = self.request.forced[len(self.token_ids)]
        if not self.token_ids:
            self.first_token_at = now_sec
        self.last_token_at = now_sec
        self.token_ids.append(token_id)

    def end_invalid(self, now_sec: float, error: str) -> None:
        """Stop here: there are no numbers to go on with."""
        self.error = self.error or error
        self.first_token_at = self.first_token_at or now_sec

    def go_on_from(self, before: "ActiveRequest") -> None:
        """Take over what another one has brought into the slot, or a copy of it."""
        self.num_seen = before.num_seen
        self.kept_tokens = before.kept_tokens
        self.kv_bytes_kept, self.kv_bytes_peak = before.kv_bytes_kept, before.kv_bytes_peak
        self.history, self.logits = list(before.history), list(before.logits)
        self.has_evicted, self.kernels = before.has_evicted, set(before.kernels)
        if before.request.token_scores is not None:
            self.request = replace(self.request, token_scores=before.request.token_scores)

    def begin_after(self, before: "ActiveRequest", now_sec: float) -> None:
        """Begin as the next turn of a dialogue, after the answer that ``before`` has given."""
        ended_itself = before.finish_reason == "stop"
        answer = before.token_ids[:-1] if ended_itself else before.token_ids
        text = [*before.request.prompt, *answer, *self.request.prompt]
        self.request = replace(self.request, prompt=text, tokens_before=0)
        self.go_on_from(before)
        self.admitted_at = now_sec

    @property
    def waits(self) -> bool:
        """Whether its slot has nothing to do in the next pass."""
        return False

    @property
    def finish_reason(self) -> str | None:
        """stop | length | invalid, or None while it runs."""
        request, token_ids = self.request, self.token_ids
        if self.error:
            return "invalid"
        assert request.stop_token_ids is not None, "settled"
        if request.forced is None and token_ids and token_ids[-1] in request.stop_token_ids:
            return "stop"
        return "length" if len(token_ids) >= request.answer_tokens else None

    @property
    def decode_tokens_per_sec(self) -> float | None:
        if len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / (self.last_token_at - self.first_token_at)
