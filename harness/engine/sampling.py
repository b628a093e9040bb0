"""Choosing the next token: greedy, or sampled from an explicit random generator per sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. ValueError out of range."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):  # nan fails every comparison
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be over 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be at least 0 and under 1, got {self.min_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def label(self) -> str:
        """greedy, or what was set: temperature=0.6,top_p=0.95."""
        if self.is_greedy:
            return "greedy"
        changed = {k: v for k, v in vars(self).items() if v != getattr(Sampling, k)}
        return ",".join(f"{key}={value}" for key, value in changed.items())

    def _warpers(self) -> LogitsProcessorList:
        """transformers' own filters in the order that ``generate`` applies them."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """One token id per row of logits [S, V]; row i draws from generators[i] only."""
        if self.is_greedy:
            return logits.argmax(dim=-1).tolist()
        # Drawn on the CPU: a generator's numbers then do not depend on the device.
        filtered = self._warpers()(None, logits.float().cpu())
        return [
            int(torch.multinomial(row.softmax(dim=-1), 1, generator=generator))
            for row, generator in zip(filtered, generators, strict=True)
        ]
