"""What goes through a slot of the engine and what comes out of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """What one sequence held after a pass, ``seen_tokens`` being prompt and answer tokens so far.

    positions: per layer [K, T] int64 original positions, ascending in each head.
    """

    seen_tokens: int
    positions: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One finished sequence. Times are wall seconds as it saw them, with others beside it.

    token_ids: new tokens, the stop token included; finish_reason: stop | length, or invalid where
    logits or a policy's scores were no finite numbers (the answer ends before that token); error
    then says which.
    kernels: what computed its attention outputs, observed: sdpa | flash | reference | triton.
    budget_tokens: None without a bound, which is always so for a policy that keeps everything.
    kept_tokens: most tokens a head held between passes.
    kv_bytes_kept: most bytes held between passes; kv_bytes_peak: most bytes at any moment, the
    chunk in work and what a codec decodes for it included; both count keys, values and all side
    state of all layers.
    ttft_sec: from getting a slot to the first token; decode_tokens_per_sec: tokens after the first
    over the time they took (None for a single token).
    kept_positions: at the end, per layer [K, T]; kept_history: after every pass;
    logits: record_logits="all": [prompt and fed answer tokens, V]; "answer": [answer tokens, V],
    those that chose each. None unless asked for.
    """

    index: int
    token_ids: list[int]
    finish_reason: str
    error: str | None
    kernels: tuple[str, ...]
    prompt_tokens: int
    budget_tokens: int | None
    kept_tokens: int
    kv_bytes_kept: int
    kv_bytes_peak: int
    ttft_sec: float
    decode_tokens_per_sec: float | None
    kept_positions: list[Tensor] | None = None
    kept_history: list[KeptTokens] | None = None
    logits: Tensor | None = None


@dataclass(kw_only=True)
class Sequence:
    """A sequence on its way through a slot.

    question_tokens: last tokens of the prompt, which the context is compressed without;
    min_new_tokens: no stop token before so many new ones; num_seen: tokens fed to the model so far;
    forced: the answer to write instead of the model's own; num_live: tokens held now, per layer
    and head; most_kept: the most of them between passes; kv_bytes_kept, kv_bytes_peak: see
    Generation.
    """

    index: int
    prompt: list[int]
    max_new_tokens: int
    budget_tokens: int | None
    stop_token_ids: frozenset[int]
    generator: torch.Generator
    question_tokens: int = 0
    min_new_tokens: int = 0
    forced: list[int] | None = None
    num_seen: int = 0
    num_live: int = 0
    most_kept: int = 0
    kv_bytes_kept: int = 0
    kv_bytes_peak: int = 0
    token_ids: list[int] = field(default_factory=list)
    history: list[KeptTokens] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    kernels: set[str] = field(default_factory=set)
    error: str | None = None

    def places(self, chunk_tokens: int) -> int:
        """Places it can ever fill: its budget and a chunk, or all its tokens if they are fewer."""
        total = len(self.prompt) + self.max_new_tokens - 1  # the last new token is never fed
        if self.budget_tokens is None:
            return total
        return min(total, self.budget_tokens + chunk_tokens)

    def next_tokens(self, chunk_tokens: int) -> list[int]:
        """What goes into the next pass: a chunk of the prompt, or the newest token."""
        if self.num_seen >= len(self.prompt):
            return self.token_ids[-1:]
        # No chunk may mix context and question. The short chunk comes first: a policy that asks the
        # last queries of a chunk (SnapKV, TOVA) then has a whole window of them at the end.
        end = self.context_tokens if self.num_seen < self.context_tokens else len(self.prompt)
        num_new = (end - self.num_seen) % chunk_tokens or chunk_tokens
        return self.prompt[self.num_seen : self.num_seen + num_new]

    @property
    def context_tokens(self) -> int:
        return len(self.prompt) - self.question_tokens

    def limit_after(self, num_new: int) -> int | None:
        """Most tokens to hold once a pass with ``num_new`` tokens has evicted; None: no bound.

        The context is compressed to leave room for the question, whose tokens then evict nothing.
        """
        if self.budget_tokens is None:
            return None
        reads_context = self.question_tokens and self.num_seen + num_new <= self.context_tokens
        return self.budget_tokens - (self.question_tokens if reads_context else 0)

    def kept_after(self, num_new: int) -> int:
        """Tokens held per head once a pass with ``num_new`` tokens has evicted."""
        touched, limit = self.num_live + num_new, self.limit_after(num_new)
        return touched if limit is None else min(touched, limit)

    def advance(self, num_new: int) -> None:
        """Account for a pass with ``num_new`` tokens."""
        self.num_live = self.kept_after(num_new)
        self.most_kept = max(self.most_kept, self.num_live)
        self.num_seen += num_new

    def add_token(self, token_id: int, now_sec: float) -> None:
        """Take a newly chosen token, or the one that is forced in its place."""
        if self.forced is not None:
            token_id = self.forced[len(self.token_ids)]
        if not self.token_ids:
            self.first_token_at = now_sec
        self.last_token_at = now_sec
        self.token_ids.append(token_id)

    def end_invalid(self, now_sec: float, error: str) -> None:
        """Stop here: there are no numbers to go on with."""
        self.error = self.error or error
        self.first_token_at = self.first_token_at or now_sec

    @property
    def finish_reason(self) -> str | None:
        """stop | length | invalid, or None while it runs."""
        if self.error:
            return "invalid"
        if self.forced is None and self.token_ids and self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_new_tokens else None

    @property
    def decode_tokens_per_sec(self) -> float | None:
        if len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / (self.last_token_at - self.first_token_at)


def in_order(finished: Iterator[Generation]) -> Iterator[Generation]:
    """The same generations by index, each as soon as all before it are there."""
    early: dict[int, Generation] = {}
    next_index = 0
    for generation in finished:
        early[generation.index] = generation
        while next_index in early:
            yield early.pop(next_index)
            next_index += 1
