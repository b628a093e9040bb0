"""KVComp: quantisation to a relative error, then Huffman coding of the codes.

The step is a share of the range of a unit: a whole block of keys, one token of values. Such coarse
units leave most codes near the middle, which is what entropy coding then lives on.
Paper: "KVComp: A High-Performance, LLM-Aware, Lossy Compression Framework for KV Cache",
https://arxiv.org/abs/2509.00579; released code: BoJiang03/kvcomp, whose turning points (the
coarsest steps without loss of accuracy) are the defaults here.

Error: |x - decoded x| <= step / 2, step <= max(rel * (max - min), 2 ** -14 * largest magnitude) of
the unit (2 ** -120 for all zeros), plus 2 ** -22 of the largest magnitude for float32 itself.
Differs from the paper: the Huffman code is zlib's, made anew for the keys and for the values of
each block, so that no code can meet an alphabet without it; the released code freezes one codebook
per layer after the prompt. Keys and values share block (64) and window (128), which leaves 128 to
191 tokens exact between passes; the released code leaves 64 to 127 keys (in blocks of 64) and 128
to 255 values (in blocks of 128). A chunk of a prompt attends to itself exactly and to what earlier
blocks decode to; the released code's accuracy runs read a prompt in one pass that attends to all
blocks of it decoded. Steps are bfloat16, offsets int16. With ``unit="layer"`` a unit spans the
heads of the block; if they evict on their own, "one token" of values is one row of them.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from kvarena.codecs.base import Block, Codec
from kvarena.codecs.bits import checked, take_rows

_FINEST = 2.0**-14  # of the largest magnitude: finer steps would not fit an int16 offset
_COARSEST_REL, _FINEST_REL = 0.5, 0.004  # the latter makes at most 254 codes, which fit a byte


@dataclass(frozen=True, kw_only=True)
class KVCompBlock(Block):
    """U = 1 where heads share a unit, else M; a number is (code + offset) * step."""

    key_stream: bytes  # deflated codes, M * R * D before
    value_stream: bytes
    key_step: Tensor  # [U, 1] bfloat16
    key_offset: Tensor  # [U, 1] int16
    value_step: Tensor  # [U, R] bfloat16
    value_offset: Tensor  # [U, R] int16


@dataclass(kw_only=True)
class KVComp(Codec):
    """rel_k, rel_v: step as a share of the unit's range; unit: heads that share one."""

    UNITS: ClassVar[tuple[str, ...]] = ("layer", "head")

    rel_k: float = 0.05
    rel_v: float = 0.1
    unit: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rel_k", "rel_v"):
            if not _FINEST_REL <= getattr(self, name) <= _COARSEST_REL:
                raise ValueError(
                    f"{name} must be from {_FINEST_REL} to {_COARSEST_REL}, got "
                    f"{getattr(self, name)}"
                )
        if self.unit not in self.UNITS:
            raise ValueError(f"unit must be one of {', '.join(self.UNITS)}, got {self.unit!r}")

    def encode(self, keys: Tensor, values: Tensor, saliency: Tensor | None) -> KVCompBlock:
        heads = (0,) if self.unit == "layer" else ()
        key_codes, key_step, key_offset = _quantise(
            checked(keys, "keys"), self.rel_k, (*heads, 1, 2)
        )
        value_codes, value_step, value_offset = _quantise(
            checked(values, "values"), self.rel_v, (*heads, 2)
        )
        return KVCompBlock(
            num_heads=keys.shape[0],
            num_rows=keys.shape[1],
            key_stream=deflate(key_codes),
            value_stream=deflate(value_codes),
            key_step=key_step,
            key_offset=key_offset,
            value_step=value_step,
            value_offset=value_offset,
        )

    def decode(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        coded = cast(Sequence[KVCompBlock], blocks)
        keys = [(b.key_stream, b.key_step, b.key_offset) for b in coded]
        values = [(b.value_stream, b.value_step, b.value_offset) for b in coded]
        shapes = [(b.num_heads, b.num_rows) for b in coded]
        return _dequantise(keys, shapes), _dequantise(values, shapes)

    def take(self, block: Block, rows: Tensor) -> KVCompBlock:
        block = cast(KVCompBlock, block)
        heads, wanted = torch.arange(block.num_heads)[:, None], rows.cpu()
        key_stream, value_stream = (
            deflate(inflate([stream]).view(block.num_heads, block.num_rows, -1)[heads, wanted])
            for stream in (block.key_stream, block.value_stream)
        )
        return replace(
            block,
            num_rows=rows.shape[1],
            key_stream=key_stream,
            value_stream=value_stream,
            value_step=take_rows(block.value_step, rows),
            value_offset=take_rows(block.value_offset, rows),
        )

    def coarser(self) -> "KVComp | None":
        rel_k, rel_v = round(self.rel_k * 1.4, 6), round(self.rel_v * 1.4, 6)
        if max(rel_k, rel_v) > _COARSEST_REL:
            return None
        return replace(self, rel_k=rel_k, rel_v=rel_v)


def deflate(codes: Tensor) -> bytes:
    """Any uint8 codes as one raw deflate stream with Huffman coding alone, no string matching."""
    coder = zlib.compressobj(wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(codes.cpu().numpy().tobytes()) + coder.flush()


def inflate(streams: Sequence[bytes]) -> Tensor:
    """The codes of all streams, one after the other, uint8 on the CPU."""
    codes = bytearray().join(zlib.decompress(stream, wbits=-15) for stream in streams)
    return torch.frombuffer(codes, dtype=torch.uint8)


def _quantise(numbers: Tensor, rel: float, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [M, R, D], and step and offset of the units that span ``dims``, [U, 1 or R]."""
    low, high = numbers.amin(dims, keepdim=True), numbers.amax(dims, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs())
    step = torch.maximum((high - low) * rel, largest * _FINEST).clamp_min(2.0**-120)
    # Cut to bfloat16 rather than rounded: a longer step would break the bound.
    step = (step.view(torch.int32) & -65536).view(torch.float32)
    offset = (low / step).round()
    codes = ((numbers / step).round() - offset).to(torch.uint8)
    return codes, step.squeeze(-1).bfloat16(), offset.squeeze(-1).to(torch.int16)


def _dequantise(
    coded: Sequence[tuple[bytes, Tensor, Tensor]], shapes: Sequence[tuple[int, int]]
) -> Tensor:
    """Float32 [N, D] of streams with their steps and offsets; ``shapes``: (M, R) of each."""
    streams, steps, offsets = zip(*coded, strict=True)
    step, offset = (
        torch.cat([part.expand(shape).flatten() for part, shape in zip(parts, shapes, strict=True)])
        for parts in (steps, offsets)
    )
    codes = inflate(streams).view(len(step), -1).to(step.device)
    # Codes and offsets are whole numbers, so only the product is rounded.
    return codes.float().add_(offset[:, None]).mul_(step[:, None].float())
