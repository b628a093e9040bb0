"""Random: every token has the same chance to stay. The floor of every comparison.

A token's score is a fixed pseudo-random number of its position, layer and KV head, so what stays is
a fair draw among all tokens so far, and the same in every run with the same seed.
Any rule that claims to know which tokens matter must beat it under the same protection.
Paper: "Fast Splittable Pseudorandom Number Generators", whose mixing of bits it draws with,
https://doi.org/10.1145/2714064.2660195.

Differs from the paper: numbers are mixed from places in the text and not from a running state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.policies.base import LayerView, Policy

# SplitMix64's odd numbers without a pattern, as signed ones: multiplied and shifted they spread
# every bit of the input over the output.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_BITS = 24  # as many as a float32 tells apart


@dataclass(kw_only=True)
class Random(Policy):
    """seed: of the draw; another one keeps other tokens."""

    seed: int = 0

    def score(self, view: LayerView) -> Tensor:
        first = view.kv_heads.start or 0
        heads = torch.arange(first, first + view.positions.shape[1], device=view.positions.device)
        place = _mixed(_mixed(torch.full_like(heads, self.seed)) + view.layer)
        of_head = _mixed(place + heads)[:, None]  # [K, 1]
        return (_mixed(of_head + view.positions) >> (64 - _BITS)).float()


def _mixed(numbers: Tensor) -> Tensor:
    """int64 of any shape, each turned into one that looks drawn by chance."""
    mixed = (numbers + 1) * _STEP
    mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    return mixed ^ _shifted(mixed, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift repeats the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
