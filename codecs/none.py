"""No codec: every kept token is stored as it is.

Method: none.
Differs from the paper: there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvarena.codecs.base import Block, Codec


@dataclass(kw_only=True)
class NoCodec(Codec):
    """Leaves every token exact, so window and block mean nothing."""

    codes: ClassVar[bool] = False

    def encode(self, keys: Tensor, values: Tensor, saliency: Tensor | None) -> Block:
        raise AssertionError("nothing is ever coded")

    def decode(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing is ever coded")

    def take(self, block: Block, rows: Tensor) -> Block:
        raise AssertionError("nothing is ever coded")
