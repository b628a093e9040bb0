"""KIVI: keys quantised per channel in groups of tokens, values per token in groups of channels.

Outliers of keys sit in a few channels, those of values do not, so each kind of group keeps its
outliers to itself. Quantisation is asymmetric, between a group's minimum and maximum.
Paper: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
https://arxiv.org/abs/2402.02750, section 3.

Default: 4 bits, which the authors recommend for models whose query heads share keys and values, and
2 for multi-head attention (docs/long_bench.md of jy-yuan/KIVI: Mistral-7B-Instruct-v0.2 averages
43.54 on LongBench, 42.43 in 2 bits, 43.53 in 4). Group size 32 and window 128 are those of the same
tables.

Error of a number: half a step, (max - min) / (2 ** bits - 1) / 2 of its group, plus what float16
bounds add (bits.py).
Differs from the paper: a prompt comes in chunks, and a chunk attends to what earlier blocks decode
to; the authors' pass over a prompt attends to exact keys and values, and codes afterwards. Between
passes the newest 128 to 159 tokens are exact (the window, and what does not fill a block); in the
authors' code 0 to 127 keys, which are coded 128 at once, and the newest 128 values, of which each
new token pushes out one. A group is held as minimum and maximum instead of minimum and step. That
heads which evict on their own hold different tokens in one row changes nothing: no group spans
heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from kvarena.codecs.base import Block, Codec, heads_of_rows
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
    """bits: 4 | 2; block: tokens of a key channel that share a scale; group: channels of a value
    that do (a smaller head is one group). The paper calls both numbers group size."""

    block: int = 32
    bits: int = 4
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
        units = power_of_two(torch.stack([b.exponents for b in coded]))  # [C, 2]
        heads, blocks_of_heads = heads_of_rows(coded, units.device)
        key_units, value_units = units.index_select(0, blocks_of_heads).unbind(1)  # of each head
        low, step = grid(torch.cat([b.key_bounds for b in coded], dim=1), self.bits)
        low, step = (
            (of_heads[:, 0] * key_units[:, None]).index_select(0, heads) for of_heads in (low, step)
        )
        key_codes = torch.cat([b.key_codes.flatten(0, 1) for b in coded])
        keys = dequantise(unpack(key_codes, self.bits, head_dim), low, step)
        bounds = torch.cat([b.value_bounds.flatten(1, 2) for b in coded], dim=1)  # [2, N, groups]
        value_units = value_units.index_select(0, heads)[:, None]
        low, step = (of_rows * value_units for of_rows in grid(bounds, self.bits))
        value_codes = torch.cat([b.value_codes.flatten(0, 1) for b in coded])
        grouped = unpack(value_codes, self.bits, head_dim).unflatten(-1, (low.shape[-1], -1))
        values = dequantise(grouped, low[..., None], step[..., None])
        return keys, values.flatten(1)

    def attend(
        self, query: Tensor, blocks: Sequence[Block], live: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor] | None:
        if not query.is_cuda or query.dtype == torch.float64:
            return None
        from kvarena.codecs.kivi_triton import attend_coded  # Triton comes with torch for CUDA

        return attend_coded(query, cast(Sequence[KIVIBlock], blocks), self.bits, live, scaling)

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
