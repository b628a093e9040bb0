"""KIVI: keys quantised per channel in groups of tokens, values per token in groups of channels.

Outliers of keys sit in a few channels, those of values do not, so each kind of group keeps its
outliers to itself. Quantisation is asymmetric, between a group's minimum and maximum.
Paper: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
https://arxiv.org/abs/2402.02750, section 3.

Error of a number: half a step, (max - min) / (2 ** bits - 1) / 2 of its group, plus what float16
bounds add (bits.py).
Differs from the paper: values wait for a full block as keys do, where the paper quantises one value
for each new token; a group is held as minimum and maximum instead of minimum and step. That heads
which evict on their own hold different tokens in one row changes nothing: no group spans heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from kvarena.codecs.base import Block, Codec
from kvarena.codecs.bits import (
    bounds_of,
    checked,
    dequantise,
    grid,
    normalised,
    pack,
    power_of_two,
    quantise,
    unpack,
)


@dataclass(frozen=True, kw_only=True)
class KIVIBlock(Block):
    """B bytes hold a row's D codes; bounds are minimum and maximum, float16; N = D / group."""

    exponents: Tensor  # [2] int8, of keys and values
    key_codes: Tensor  # [M, R, B] uint8
    key_bounds: Tensor  # [2, M, 1, D]
    value_codes: Tensor  # [M, R, B]
    value_bounds: Tensor  # [2, M, R, N]


@dataclass(kw_only=True)
class KIVI(Codec):
    """bits: 2 | 4; block: tokens of a key channel that share a scale; group: channels of a value
    that do (a smaller head is one group). The paper calls both numbers group size."""

    block: int = 32
    bits: int = 2
    group: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4):
            raise ValueError(f"bits must be 2 or 4, got {self.bits}")
        if self.group < 1:
            raise ValueError(f"group must be >= 1 channel, got {self.group}")

    def encode(self, keys: Tensor, values: Tensor, saliency: Tensor | None) -> KIVIBlock:
        num_heads, num_rows, head_dim = keys.shape
        group = min(self.group, head_dim)
        if head_dim % group:
            raise ValueError(f"group={group} must divide the head dimension {head_dim}")
        keys, key_exponent = normalised(checked(keys, "keys"))
        values, value_exponent = normalised(checked(values, "values"))
        key_bounds = bounds_of(keys, (1,))
        grouped = values.unflatten(-1, (-1, group))  # [M, R, N, group]
        value_bounds = bounds_of(grouped, (-1,))
        value_codes = quantise(grouped, value_bounds, self.bits).flatten(2)
        return KIVIBlock(
            num_heads=num_heads,
            num_rows=num_rows,
            exponents=torch.cat([key_exponent, value_exponent]),
            key_codes=pack(quantise(keys, key_bounds, self.bits), self.bits),
            key_bounds=key_bounds,
            value_codes=pack(value_codes, self.bits),
            value_bounds=value_bounds.squeeze(-1),
        )

    def decode(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        coded = cast(Sequence[KIVIBlock], blocks)
        head_dim = coded[0].key_bounds.shape[-1]
        key_unit, value_unit = power_of_two(torch.stack([b.exponents for b in coded], dim=1))
        key_codes = unpack(torch.stack([b.key_codes for b in coded]), self.bits, head_dim)
        low, step = grid(torch.stack([b.key_bounds for b in coded], dim=1), self.bits)
        unit = key_unit[:, None, None, None]
        keys = dequantise(key_codes, low * unit, step * unit)  # [C, M, R, D]
        value_codes = unpack(torch.stack([b.value_codes for b in coded]), self.bits, head_dim)
        low, step = grid(torch.stack([b.value_bounds for b in coded], dim=1), self.bits)
        unit = value_unit[:, None, None, None]
        grouped = value_codes.unflatten(-1, (low.shape[-1], -1))  # [C, M, R, N, group]
        values = dequantise(grouped, (low * unit)[..., None], (step * unit)[..., None])
        return keys, values.flatten(-2)

    def take(self, block: Block, rows: Tensor) -> KIVIBlock:
        block = cast(KIVIBlock, block)
        heads = torch.arange(block.num_heads, device=rows.device)[:, None]
        return replace(
            block,
            num_rows=rows.shape[1],
            key_codes=block.key_codes[heads, rows],
            value_codes=block.value_codes[heads, rows],
            value_bounds=block.value_bounds[:, heads, rows],
        )

    def coarser(self) -> "KIVI | None":
        return replace(self, bits=2) if self.bits > 2 else None
