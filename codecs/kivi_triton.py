"""Attention over KIVI's coded tokens on CUDA: codes are decoded on the chip, tile by tile.

A decoding step reads every cached byte once and computes little, so what counts is that 2 or 4 bits
per number are read rather than 16 written and read again. The result comes with its log-sum-exp, to
be merged with the attention over the exact window. Coded tokens are older than every query of a
pass, hence no causal mask. codecs/kivi.py calls it on CUDA, and decodes with plain torch elsewhere.

Shape letters: M KV heads coded together, H' = M * G of their query heads, Q query tokens, C blocks
of R tokens each, D head dim, B bytes per R codes.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarena.codecs.base import merge
from kvarena.codecs.bits import power_of_two
from kvarena.codecs.kivi import KIVIBlock

# Tokens per program. One program per KV head would leave most of a card idle; at 8 heads and 8k
# tokens this makes 256 of them.
_TOKENS_EACH = 256
_LEAST = 16  # least side of a tile in a product on tensor cores


def attend_coded(
    query: Tensor, blocks: Sequence[KIVIBlock], bits: int, live: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output [H', Q, D] and log-sum-exp [H', Q], both float32; query [H', Q, D].

    blocks: at least one, all of M heads and R rows, coded with ``bits``; live: bool [C, M, R], rows
    that have not been evicted (None: all). A head without live rows gives 0 and -inf.
    """
    num_heads, num_rows = blocks[0].num_heads, blocks[0].num_rows
    D = query.shape[-1]
    num_queries = query.shape[0] // num_heads * query.shape[1]
    blocks_each = triton.cdiv(_TOKENS_EACH, num_rows)
    num_parts = triton.cdiv(len(blocks), blocks_each)
    shape = (num_parts, *query.shape[:2])
    outputs = torch.empty(*shape, D, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
    block_p = min(64, max(triton.next_power_of_2(num_queries), _LEAST))
    with torch.cuda.device_of(query):
        _attend_part[(triton.cdiv(num_queries, block_p), num_parts, num_heads)](
            query.contiguous(),
            power_of_two(torch.stack([block.exponents for block in blocks])),  # [C, 2]
            torch.stack([block.key_codes for block in blocks]),  # [C, M, R, B]
            torch.stack([block.key_bounds for block in blocks]),  # [C, 2, M, 1, D]
            torch.stack([block.value_codes for block in blocks]),  # [C, M, R, B]
            torch.stack([block.value_bounds for block in blocks]),  # [C, 2, M, R, groups]
            outputs if live is None else live.contiguous().view(torch.uint8),
            outputs,
            log_sums,
            scaling,
            len(blocks),
            num_queries,
            num_heads,
            num_rows,
            blocks_each,
            HAS_DEAD=live is not None,
            BITS=bits,
            D=D,
            GROUPS=blocks[0].value_bounds.shape[-1],
            BLOCK_P=block_p,
            BLOCK_R=max(triton.next_power_of_2(num_rows), _LEAST),
            BLOCK_D=max(triton.next_power_of_2(D), _LEAST),
        )
    return merge(outputs, log_sums)


@triton.jit
def _codes(
    packed: tl.tensor,
    rows: tl.tensor,
    dims: tl.tensor,
    inside: tl.tensor,
    D: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Codes, float32, at the outer product of rows and dims, whichever of them comes first."""
    per_byte: tl.constexpr = 8 // BITS
    row_bytes: tl.constexpr = (D + per_byte - 1) // per_byte
    read = tl.load(packed + rows * row_bytes + dims // per_byte, mask=inside, other=0)
    shifted = read.to(tl.int32) >> (dims % per_byte * BITS)
    return (shifted & (2**BITS - 1)).to(tl.float32)


@triton.jit
def _attend_part(
    query: tl.tensor,
    units: tl.tensor,
    key_codes: tl.tensor,
    key_bounds: tl.tensor,
    value_codes: tl.tensor,
    value_bounds: tl.tensor,
    live: tl.tensor,
    outputs: tl.tensor,
    log_sums: tl.tensor,
    scaling: tl.tensor,
    num_blocks: tl.tensor,
    num_queries: tl.tensor,
    num_heads: tl.tensor,
    num_rows: tl.tensor,
    blocks_each: tl.tensor,
    HAS_DEAD: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program: a tile of one KV head's queries over some of the blocks, one block at a time."""
    part, head = tl.program_id(1), tl.program_id(2)
    asked = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    is_asked, is_row, is_dim = asked < num_queries, rows < num_rows, dims < D
    query_at = (head * num_queries + asked)[:, None] * D + dims[None, :]
    queries = tl.load(query + query_at, mask=is_asked[:, None] & is_dim[None, :], other=0.0)
    groups = dims // (D // GROUPS)

    largest = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    mixed = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    first = part * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, num_blocks)):
        low_at = block * 2 * num_heads + head
        high_at = low_at + num_heads
        first_row = (block * num_heads + head) * num_rows

        unit = tl.load(units + block * 2)
        low = tl.load(key_bounds + low_at * D + dims, mask=is_dim, other=0.0).to(tl.float32)
        high = tl.load(key_bounds + high_at * D + dims, mask=is_dim, other=0.0).to(tl.float32)
        step = (high - low) / (2**BITS - 1)
        inside = is_dim[:, None] & is_row[None, :]
        codes = _codes(key_codes, first_row + rows[None, :], dims[:, None], inside, D, BITS)
        keys = codes * (step * unit)[:, None] + (low * unit)[:, None]  # [D, R]
        logits = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scaling
        alive = is_row
        if HAS_DEAD:
            alive = alive & (tl.load(live + first_row + rows, mask=is_row, other=0) != 0)
        logits = tl.where(alive[None, :], logits, float("-inf"))

        unit = tl.load(units + block * 2 + 1)
        inside = is_row[:, None] & is_dim[None, :]
        at = rows[:, None] * GROUPS + groups[None, :]
        low_rows = value_bounds + low_at * num_rows * GROUPS
        high_rows = value_bounds + high_at * num_rows * GROUPS
        low = tl.load(low_rows + at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(high_rows + at, mask=inside, other=0.0).to(tl.float32)
        step = (high - low) / (2**BITS - 1)
        codes = _codes(value_codes, first_row + rows[:, None], dims[None, :], inside, D, BITS)
        values = codes * (step * unit) + low * unit  # [R, D]

        higher = tl.maximum(largest, tl.max(logits, axis=1))
        # As long as no live row has been met, the maximum is -inf, and any other number will do.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - shift[:, None])
        rescale = tl.exp(largest - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        weighted = tl.dot(
            weights.to(queries.dtype), values.to(queries.dtype), input_precision="ieee"
        )
        mixed = mixed * rescale[:, None] + weighted
        largest = higher

    total = tl.where(total > 0, total, 1.0)  # without a live row, the maximum is -inf and stays so
    to = (part * num_heads + head) * num_queries + asked
    tl.store(log_sums + to, largest + tl.log(total), mask=is_asked)
    inside = is_asked[:, None] & is_dim[None, :]
    tl.store(outputs + to[:, None] * D + dims[None, :], mixed / total[:, None], mask=inside)
