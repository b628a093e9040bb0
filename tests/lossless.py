"""A codec that loses nothing: what the coded store does with it must equal what none does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.codecs.base import Block, Codec, Probes


@dataclass(frozen=True, kw_only=True)
class RawBlock(Block):
    keys: Tensor
    values: Tensor


@dataclass(kw_only=True)
class Lossless(Codec):
    """``weighs``: also asks for saliency, and keeps what it got for the test to see."""

    weighs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weights: list[Tensor] = []

    @property
    def probes(self) -> Probes | None:
        return Probes(recent=0.1, random=0.1, count="probes") if self.weighs else None

    def encode(self, keys: Tensor, values: Tensor, saliency: Tensor | None) -> RawBlock:
        assert (saliency is not None) == self.weighs
        if saliency is not None:
            assert saliency.shape == keys.shape[:2]
            self.weights.append(saliency)
        return RawBlock(
            num_heads=keys.shape[0],
            num_rows=keys.shape[1],
            keys=keys.clone(),
            values=values.clone(),
        )

    def decode(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        return (
            torch.cat([block.keys.flatten(0, 1) for block in blocks]),
            torch.cat([block.values.flatten(0, 1) for block in blocks]),
        )

    def take(self, block: Block, rows: Tensor) -> RawBlock:
        assert isinstance(block, RawBlock)
        index = rows[..., None].expand(*rows.shape, block.keys.shape[-1])
        return RawBlock(
            num_heads=block.num_heads,
            num_rows=rows.shape[1],
            keys=block.keys.gather(1, index),
            values=block.values.gather(1, index),
        )
