"""ZipCache: tokens that get attention in more bits than the rest, with few scales.

Keys are quantised per channel, over all tokens of a precision class in the block; values per token
after each channel was divided by the root of its largest magnitude (channel-separable tokenwise).
A token's saliency is the attention that probe queries, 5 % newest and 5 % random, give it, divided
by how many of them can see it.
Paper: "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
https://arxiv.org/abs/2405.14256; released code: ThisisBillhe/ZipCache.

Error of a key: half a step, (max - min) / (2 ** bits - 1) / 2 of its unit, plus what float16 bounds
add (bits.py); of a value: the same for its divided row, times the channel's divisor.
Differs from the paper: a prompt comes in chunks, and a chunk attends to what earlier blocks decode
to; the released code's pass over a prompt attends to exact keys and values, and codes afterwards.
A block is coded once, when it has left a window of exact tokens (between passes 128 to 255 tokens);
the released code keeps no token of a prompt exact and at most 99 written ones, and decodes and
codes everything again after every 100. So bounds and divisors span a block here, there all tokens
(of a class) in the prompt, and ``salient`` is a share of each block here, there of the prompt.
Saliency is judged when a block leaves the window, by the probes of the text so far, before the rest
(the question, often) is read; there a prompt is judged at its end, and 100 written tokens by the
one query of that step, undivided. Random probes are drawn by position, none twice.
With ``unit="layer"`` a value's bounds span row r of all heads, one token unless heads evict on
their own; the released code joins the r-th salient tokens of all heads, which are different tokens.
A row's bounds serve both classes, each with its own number of steps. ``count="text"`` divides by
all queries of the text that can see the token, as the released code does; "probes" by the probes
that can, the paper's formula.

block=128 holds the fewest bytes from about 1500 to 5300 tokens of SmolLM2 (bits per coded number at
60 % salient: 3.90 at block 64, 3.61 at 128, 3.45 at 256, 3.31 for 2048 at once): a smaller one has
more bounds, of a larger one more tokens wait uncoded. Smaller blocks also lose less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from kvarena.codecs.base import Block, Codec, Probes, heads_of_rows
from kvarena.codecs.bits import (
    bounds_of,
    checked,
    dequantise,
    grid,
    normalised,
    pack,
    power_of_two,
    quantise,
    take_rows,
    unpack,
)


@dataclass(frozen=True, kw_only=True)
class ZipCacheBlock(Block):
    """The rows of one head after the other, split by class: N1 salient and N2 regular ones.

    Bounds are minimum and maximum, float16; those of keys have M = 0 where a class was empty.
    """

    exponents: Tensor  # [2] int8, of keys and values
    is_salient: Tensor  # [M, ceil(R / 8)] bit map
    salient_codes: Tensor  # [N1, 2, B] uint8
    regular_codes: Tensor  # [N2, 2, B']
    salient_keys: Tensor  # [2, M, 1, D] bounds
    regular_keys: Tensor  # [2, M, 1, D]
    value_bounds: Tensor  # [2, U, R], U = 1 if all heads share them, else M
    divisors: Tensor  # [M, 1, D] float16, of the value channels


@dataclass(kw_only=True)
class ZipCache(Codec):
    """salient: share of a block's tokens in ``salient_bits``; recent and random: shares of the
    queries that probe; count: "probes" | "text"; unit: heads that share a value's bounds."""

    UNITS: ClassVar[tuple[str, ...]] = ("layer", "head")
    COUNTS: ClassVar[tuple[str, ...]] = ("probes", "text")

    block: int = 128
    salient: float = 0.6
    salient_bits: int = 4
    regular_bits: int = 2
    recent: float = 0.05
    random: float = 0.05
    count: str = "probes"
    unit: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("salient", "recent", "random"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, got {getattr(self, name)}")
        for name in ("salient_bits", "regular_bits"):
            if getattr(self, name) not in (2, 4):
                raise ValueError(f"{name} must be 2 or 4, got {getattr(self, name)}")
        for name, allowed in (("count", self.COUNTS), ("unit", self.UNITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )

    @property
    def probes(self) -> Probes | None:
        if self.salient in (0, 1):  # one class needs no weighing
            return None
        return Probes(recent=self.recent, random=self.random, count=self.count)

    def encode(self, keys: Tensor, values: Tensor, saliency: Tensor | None) -> ZipCacheBlock:
        num_heads, num_rows, _ = keys.shape
        keys, key_exponent = normalised(checked(keys, "keys"))
        values, value_exponent = normalised(checked(values, "values"))
        divisors = values.abs().amax(dim=1, keepdim=True).sqrt().half()  # [M, 1, D]
        divisors[divisors == 0] = 1
        values = values / divisors
        value_bounds = bounds_of(values, (0, 2) if self.unit == "layer" else (2,))  # [2, U, R, 1]
        is_salient = self._salient_rows(keys, saliency)
        classes = (is_salient, self.salient_bits), (~is_salient, self.regular_bits)
        (salient_codes, salient_keys), (regular_codes, regular_keys) = (
            _code_rows(keys, values, value_bounds, rows, bits) for rows, bits in classes
        )
        return ZipCacheBlock(
            num_heads=num_heads,
            num_rows=num_rows,
            exponents=torch.cat([key_exponent, value_exponent]),
            is_salient=pack(is_salient.to(torch.uint8), 1),
            salient_codes=salient_codes,
            regular_codes=regular_codes,
            salient_keys=salient_keys,
            regular_keys=regular_keys,
            value_bounds=value_bounds.squeeze(-1),
            divisors=divisors,
        )

    def _salient_rows(self, keys: Tensor, saliency: Tensor | None) -> Tensor:
        """[M, R] bool: the ``salient`` share of each head's rows with the most saliency."""
        num_salient = round(self.salient * keys.shape[1])
        if num_salient in (0, keys.shape[1]):
            return torch.full(keys.shape[:2], num_salient > 0, device=keys.device)
        assert saliency is not None, "the engine hands over what probes ask for"
        best = saliency.argsort(dim=1, descending=True, stable=True)[:, :num_salient]
        return torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, best, True)

    def decode(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        coded = cast(Sequence[ZipCacheBlock], blocks)
        head_dim = coded[0].divisors.shape[-1]
        units = power_of_two(torch.stack([b.exponents for b in coded]))  # [C, 2]
        heads, blocks_of_heads = heads_of_rows(coded, units.device)
        key_units, value_units = units.index_select(0, blocks_of_heads).unbind(1)  # of each head
        maps = [unpack(b.is_salient, 1, b.num_rows).flatten() for b in coded]
        is_salient = torch.cat(maps).bool()  # [N]
        salient = unpack(torch.cat([b.salient_codes for b in coded]), self.salient_bits, head_dim)
        regular = unpack(torch.cat([b.regular_codes for b in coded]), self.regular_bits, head_dim)
        places = _places(is_salient) + ~is_salient * len(salient)
        codes = torch.cat([salient, regular]).index_select(0, places)
        key_codes, value_codes = codes.unbind(1)  # [N, D]

        # First the grids of all heads' salient rows, then those of all heads' regular ones.
        of_salient = [_either(b.salient_keys, b.regular_keys) for b in coded]
        of_regular = [_either(b.regular_keys, b.salient_keys) for b in coded]
        grids = zip(
            grid(torch.cat(of_salient, dim=1), self.salient_bits),
            grid(torch.cat(of_regular, dim=1), self.regular_bits),
            strict=True,
        )
        classes = heads + ~is_salient * len(key_units)
        low, step = (
            (torch.cat(pair)[:, 0] * key_units.repeat(2)[:, None]).index_select(0, classes)
            for pair in grids
        )
        keys = dequantise(key_codes, low, step)
        bounds = [b.value_bounds.expand(2, b.num_heads, -1).flatten(1) for b in coded]
        low, step = _by_class(is_salient, torch.cat(bounds, dim=1), self)
        divisors = torch.cat([b.divisors for b in coded])[:, 0] * value_units[:, None]
        values = dequantise(value_codes, low[:, None], step[:, None])
        return keys, values.mul_(divisors.index_select(0, heads))

    def take(self, block: Block, rows: Tensor) -> ZipCacheBlock:
        block = cast(ZipCacheBlock, block)
        was_salient = unpack(block.is_salient, 1, block.num_rows).bool()
        is_salient, places = was_salient.gather(1, rows), _places(was_salient).gather(1, rows)
        return replace(
            block,
            num_rows=rows.shape[1],
            is_salient=pack(is_salient.to(torch.uint8), 1),
            salient_codes=block.salient_codes[places[is_salient]],
            regular_codes=block.regular_codes[places[~is_salient]],
            value_bounds=take_rows(block.value_bounds, rows),
        )

    def coarser(self) -> "ZipCache | None":
        if self.salient == 0:
            return None
        return replace(self, salient=max(0.0, round(self.salient - 0.2, 6)))


def _code_rows(
    keys: Tensor, values: Tensor, value_bounds: Tensor, rows: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes [N, 2, B] and key bounds [2, M, 1, D] of the ``rows`` [M, R], as many in each head."""
    num_heads, _, head_dim = keys.shape
    if not rows.any():
        empty = keys.new_empty(0, 2, head_dim, dtype=torch.uint8)
        return pack(empty, bits), keys.new_empty(2, 0, 1, head_dim, dtype=torch.float16)
    own_keys = keys[rows].unflatten(0, (num_heads, -1))
    key_bounds = bounds_of(own_keys, (1,))
    key_codes = quantise(own_keys, key_bounds, bits).flatten(0, 1)
    own_bounds = value_bounds.expand(2, *rows.shape, 1)[:, rows]  # [2, N, 1]
    value_codes = quantise(values[rows], own_bounds, bits)
    return pack(torch.stack([key_codes, value_codes], dim=1), bits), key_bounds


def _places(is_salient: Tensor) -> Tensor:
    """Where each row's codes stand among all those of its class; int64 in the given shape."""
    flat = is_salient.flatten()
    return (torch.where(flat, flat.cumsum(0), (~flat).cumsum(0)) - 1).view(is_salient.shape)


def _either(bounds: Tensor, other: Tensor) -> Tensor:
    """Bounds of a class; where no row is in it, anything of the right shape."""
    return bounds if bounds.numel() else other


def _by_class(is_salient: Tensor, bounds: Tensor, codec: ZipCache) -> tuple[Tensor, Tensor]:
    """Lowest level and step [N] in each row's own class, of ``bounds`` [2, N] that serve both."""
    pairs = zip(grid(bounds, codec.salient_bits), grid(bounds, codec.regular_bits), strict=True)
    low, step = (torch.where(is_salient, salient, regular) for salient, regular in pairs)
    return low, step
