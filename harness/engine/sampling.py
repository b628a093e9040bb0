"""Choosing the next token: greedy, or sampled from an explicit random generator per sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvarena.harness.sampling import Sampling


def choose(sampling: Sampling, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """One token id per row of logits [S, V]; row i draws from generators[i] only."""
    if sampling.is_greedy:
        return logits.argmax(dim=-1).tolist()
    # Drawn on the CPU: a generator's numbers then do not depend on the device.
    filtered = _warpers(sampling)(None, logits.float().cpu())
    return [
        int(torch.multinomial(row.softmax(dim=-1), 1, generator=generator))
        for row, generator in zip(filtered, generators, strict=True)
    ]


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own filters in the order that ``generate`` applies them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
