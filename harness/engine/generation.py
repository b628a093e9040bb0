"""What the engine gives back for a request."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

HeldPositions = Tensor | list[Tensor]


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """What one request held after a pass, ``seen_tokens`` being prompt and answer tokens so far.

    positions: per layer and KV head, int64 original positions in ascending order: [K, T], or K
    tensors where heads hold different numbers of tokens.
    """

    seen_tokens: int
    positions: list[HeldPositions]

    @property
    def stacked(self) -> Tensor:
        """[L, K, T] int64, where all heads of all layers hold equally many tokens."""
        assert all(isinstance(layer, Tensor) for layer in self.positions), "heads are uneven"
        return torch.stack([torch.as_tensor(layer) for layer in self.positions])


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One finished request. Times are wall seconds as it saw them, with others beside it.

    token_ids: new tokens, the stop token included; finish_reason: stop | length, or invalid where
    logits or a policy's scores were no finite numbers (the answer ends before that token); error
    then says which.
    kernels: what computed its attention outputs, observed: sdpa | flash | reference | triton.
    prompt_tokens: all that it has been fed before its answer, earlier turns of a dialogue included.
    prefill_tokens: how many of them were computed for it: those of a shared context count once,
    for the question that is asked first, those of earlier turns for the earlier turns.
    budget_tokens: None without a bound, which is always so for a policy that keeps everything.
    has_evicted: whether the budget ever bound.
    kept_tokens: most tokens a head held between passes, on average over all heads.
    kv_bytes_kept: most bytes held between passes; kv_bytes_peak: most bytes at any moment, the
    chunk in work and what a codec decodes for it included; both count keys, values and all side
    state of all layers.
    ttft_sec: from getting a slot to the first token; decode_tokens_per_sec: tokens after the first
    over the time they took (None for a single token).
    kept_positions: at the end, as in KeptTokens; kept_history: after every pass;
    logits: record_logits="all": [prompt and fed answer tokens, V]; "answer": [answer tokens, V],
    those that chose each. None unless asked for.
    """

    index: int
    token_ids: list[int]
    finish_reason: str
    error: str | None
    kernels: tuple[str, ...]
    prompt_tokens: int
    prefill_tokens: int
    budget_tokens: int | None
    has_evicted: bool
    kept_tokens: int
    kv_bytes_kept: int
    kv_bytes_peak: int
    ttft_sec: float
    decode_tokens_per_sec: float | None
    kept_positions: list[HeldPositions] | None = None
    kept_history: list[KeptTokens] | None = None
    logits: Tensor | None = None


def in_order(finished: Iterator[Generation]) -> Iterator[Generation]:
    """The same generations by index, each as soon as all before it are there."""
    early: dict[int, Generation] = {}
    next_index = 0
    for generation in finished:
        early[generation.index] = generation
        while next_index in early:
            yield early.pop(next_index)
            next_index += 1
