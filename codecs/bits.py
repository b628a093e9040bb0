"""Few-bit codes: asymmetric uniform quantisation between bounds, and packing codes into bytes.

A unit is what shares one pair of bounds, its minimum and maximum. These are held in float16, so the
numbers of a block are first divided by a power of two that brings them into [-1, 1]: bounds of huge
numbers cannot overflow then, and those of tiny ones keep their digits. Codes are made from the
ROUNDED bounds, so encoder and decoder mean the same grid.

Error: |x - decoded x| <= (maximum - minimum) / (2 * (2 ** bits - 1)) + a / 1000 + b / 2 ** 20, with
a the largest magnitude in the unit and b that in the whole tensor (at least 2 ** -90); the last two
terms are what rounding the bounds costs.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 2.0**126  # magnitudes up to here leave room for a maximum minus a minimum
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}  # 8 / bits bytes, one per code
_TINY = 2.0**-40  # under any step between bounds in [-1, 1]: a unit of equal numbers has step 0


def checked(numbers: Tensor, name: str) -> Tensor:
    """The numbers in float32. Raises ValueError if one is NaN, infinite or over ``LARGEST``."""
    numbers = numbers.float()
    largest = float(numbers.abs().amax())
    if not largest <= LARGEST:
        raise ValueError(
            f"{name} hold a number that cannot be coded (largest magnitude {largest}); all must be "
            "finite and at most 2 ** 126: look for an overflow in the model, or try another dtype"
        )
    return numbers


def normalised(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers over 2 ** exponent, all within [-1, 1], and the exponent, int8 [1]."""
    exponent = torch.frexp(numbers.abs().amax()).exponent.clamp(-90, 126).to(torch.int8)
    return numbers * power_of_two(-exponent), exponent[None]


def power_of_two(exponent: Tensor) -> Tensor:
    """2.0 ** exponent in float32, exactly; exponents from -126 to 127."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def bounds_of(numbers: Tensor, dims: tuple[int, ...]) -> Tensor:
    """[2, ...] float16: minimum and maximum over ``dims``, which stay with length 1."""
    return torch.stack([numbers.amin(dims, keepdim=True), numbers.amax(dims, keepdim=True)]).half()


def grid(bounds: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Lowest level and step between levels, float32, from bounds [2, ...]."""
    low, high = bounds.float()
    return low, (high - low) / (2**bits - 1)


def quantise(numbers: Tensor, bounds: Tensor, bits: int) -> Tensor:
    """Codes uint8 in the shape of the numbers; ``bounds`` [2, ...] must broadcast to them."""
    low, step = grid(bounds, bits)
    # Rounded bounds may cut off the outermost numbers by a little.
    codes = ((numbers - low) / step.clamp_min(_TINY)).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8)


def dequantise(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """Float32 numbers ``codes * step + low``."""
    # Fused into one instruction in some places only, the last bit would depend on what else is
    # decoded along.
    return codes.float().mul_(step).add_(low)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2 or 4 bits, [..., N], to [..., ceil(N * bits / 8)] bytes, first code lowest."""
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    return (codes << _shifts(bits, codes.device)).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """[..., B] bytes to the first ``num_codes`` codes of each row, [..., num_codes] uint8."""
    # One lookup per byte yields all its codes: four times as fast as shifts and masks on a CPU.
    table = _codes_of_bytes(bits, packed.device)
    found = table.index_select(0, packed.flatten().int()).view(packed.shape)
    return found.view(torch.uint8)[..., :num_codes]


def take_rows(shared: Tensor, rows: Tensor) -> Tensor:
    """Entries [..., U, R] at ``rows`` [M, R']: U is 1 for what all heads share, else M.

    Rows may differ from head to head, so each head gets its own entries unless all are equal.
    """
    lead = shared.shape[:-2]
    each = shared.expand(*lead, len(rows), -1).gather(-1, rows.expand(*lead, *rows.shape))
    first = each[..., :1, :]
    return first.clone() if bool((each == first).all()) else each


@cache
def _codes_of_bytes(bits: int, device: torch.device) -> Tensor:
    """[256]: the codes that each byte holds, as one word."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    codes = (every_byte >> _shifts(bits, device)) & (2**bits - 1)  # [256, 8 / bits]
    return codes.view(_WORDS[bits]).flatten()


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
