"""Attention and the mass each key received, on CUDA, without ever storing the weights.

The output comes with the log-sum-exp of every query's logits, so that a key's mass is a sum of
exp(logit - log-sum-exp) over the queries: one more product of queries and keys, of which only the
column sums leave the chip. The explicit way writes and reads [S, H, Q, T] float32 several times.
Mask: causal, aligned to the lower right. No soft-cap, attention sinks or sliding window.

Shape letters: S sequences, H query heads, K KV heads, G = H/K, Q query tokens, T cached tokens (the
last Q of them are this pass's own), D head dim; a row is one query of one of a group's G heads.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tiles of 64 rows feed Hopper's tensor cores; a tile of products of 16-bit numbers is never less
# than 16 wide.
_TILE = 64
_LEAST = 16


def attend_with_mass(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output [S, H, Q, D] and mass [S, K, T] float32; query [S, H, Q, D], the others [S, K, T, D].

    Contiguity is needed along D only.
    """
    output, log_sums = _attend(query, keys, values, scaling)
    return output, column_mass(query, keys, log_sums, scaling)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output [S, H, Q, D] and log-sum-exp [S, H, Q] float32, by torch's FlashAttention if it can.

    It cannot in float32, nor on cards before Ampere; there a kernel of this file finds the sums.
    """
    S, H, Q, D = query.shape
    if Q == 1:
        # The group becomes the query axis, all of which sees everything.
        query = query.reshape(S, -1, H // keys.shape[1], D)
    grouped = query.shape[1] != keys.shape[1]
    params = torch.backends.cuda.SDPAParams(query, keys, values, None, 0.0, False, grouped)
    if D % 8 == 0 and torch.backends.cuda.can_use_flash_attention(params):
        # This operator's causal mask is aligned to the lower right, unlike that of
        # scaled_dot_product_attention, which does not return the sums either.
        output, log_sums = torch.ops.aten._scaled_dot_product_flash_attention(
            query, keys, values, 0.0, is_causal=Q > 1, scale=scaling
        )[:2]
    else:
        mask = causal_lower_right(Q, keys.shape[2]) if Q > 1 else None
        output = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )
        log_sums = log_sum_exp(query.reshape(S, H, Q, D), keys, scaling)
    return output.reshape(S, H, Q, -1), log_sums.reshape(S, H, Q)


def column_mass(query: Tensor, keys: Tensor, log_sums: Tensor, scaling: float) -> Tensor:
    """Mass [S, K, T] float32: weights summed over the queries and the group, in a fixed order.

    query: [S, H, Q, D]; keys: [S, K, T, D]; log_sums: [S, H, Q] float32 of the masked logits.
    """
    S, H, Q, D = query.shape
    K, T = keys.shape[1:3]
    mass = torch.empty(S, K, T, dtype=torch.float32, device=query.device)
    log_sums = log_sums.contiguous()
    with torch.cuda.device_of(query):
        _column_mass[(triton.cdiv(T, _TILE), S * K)](
            query,
            keys,
            log_sums,
            mass,
            scaling,
            Q,
            T,
            H // K * Q,
            *query.stride()[:3],
            *keys.stride()[:3],
            K=K,
            D=D,
            **_tiles(H // K * Q, D),
        )
    return mass


def log_sum_exp(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Log-sum-exp [S, H, Q] float32 of each query's masked logits; shapes as ``column_mass``."""
    S, H, Q, D = query.shape
    K, T = keys.shape[1:3]
    sums = torch.empty(S, H, Q, dtype=torch.float32, device=query.device)
    tiles = _tiles(H // K * Q, D)
    with torch.cuda.device_of(query):
        _log_sum_exp[(triton.cdiv(H // K * Q, tiles["BLOCK_R"]), S * K)](
            query,
            keys,
            sums,
            scaling,
            Q,
            T,
            H // K * Q,
            *query.stride()[:3],
            *keys.stride()[:3],
            K=K,
            D=D,
            **tiles,
        )
    return sums


def _tiles(num_rows: int, head_dim: int) -> dict[str, int]:
    return {
        "BLOCK_R": _LEAST if num_rows <= _LEAST else _TILE,
        "BLOCK_T": _TILE,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), _LEAST),
    }


@triton.jit
def _logits(
    query: Tensor,
    keys: Tensor,
    rows: Tensor,
    places: Tensor,
    scaling: float,
    Q: int,
    T: int,
    num_rows: int,
    query_head: int,
    query_token: int,
    key_token: int,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> Tensor:
    """Masked logits [R, T'] of one KV head's rows and places, -inf where a row sees nothing."""
    dims = tl.arange(0, BLOCK_D)
    from_query = (rows // Q) * query_head + (rows % Q) * query_token
    asked = tl.load(
        query + from_query[:, None] + dims[None, :],
        mask=(rows < num_rows)[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    held = tl.load(
        keys + places[None, :] * key_token + dims[:, None],
        mask=(places < T)[None, :] & (dims < D)[:, None],
        other=0.0,
    )
    # Without "ieee", float32 products would be rounded to tf32's 10 bits on the tensor cores.
    logits = tl.dot(asked, held, input_precision="ieee") * scaling
    seen = places[None, :] <= (T - Q + rows % Q)[:, None]
    return tl.where(seen & (rows < num_rows)[:, None], logits, float("-inf"))


@triton.jit
def _column_mass(
    query: Tensor,
    keys: Tensor,
    log_sums: Tensor,
    mass: Tensor,
    scaling: float,
    Q: int,
    T: int,
    num_rows: int,
    query_sequence: int,
    query_head: int,
    query_token: int,
    key_sequence: int,
    key_head: int,
    key_token: int,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program: a tile of places of one KV head, over all its rows."""
    pair = tl.program_id(1).to(tl.int64)  # caches pass 2^31 elements
    sequence, head = pair // K, pair % K
    places = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # H * Q rows of log-sum-exps per sequence are G * Q per KV head, in the order of the rows.
    log_sums += pair * num_rows
    query += sequence * query_sequence + head * (num_rows // Q) * query_head
    keys += sequence * key_sequence + head * key_head
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for first in range(0, num_rows, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        logits = _logits(
            query,
            keys,
            rows,
            places,
            scaling,
            Q,
            T,
            num_rows,
            query_head,
            query_token,
            key_token,
            D,
            BLOCK_D,
        )
        log_sum = tl.load(log_sums + rows, mask=rows < num_rows, other=0.0)
        total += tl.sum(tl.exp(logits - log_sum[:, None]), axis=0)
    tl.store(mass + pair * T + places, total, mask=places < T)


@triton.jit
def _log_sum_exp(
    query: Tensor,
    keys: Tensor,
    sums: Tensor,
    scaling: float,
    Q: int,
    T: int,
    num_rows: int,
    query_sequence: int,
    query_head: int,
    query_token: int,
    key_sequence: int,
    key_head: int,
    key_token: int,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program: a tile of one KV head's rows, over all places; a running maximum and sum."""
    pair = tl.program_id(1).to(tl.int64)
    sequence, head = pair // K, pair % K
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    query += sequence * query_sequence + head * (num_rows // Q) * query_head
    keys += sequence * key_sequence + head * key_head
    largest = tl.full([BLOCK_R], -1e38, dtype=tl.float32)  # finite: -inf - -inf is no number
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in range(0, T, BLOCK_T):
        logits = _logits(
            query,
            keys,
            rows,
            first + tl.arange(0, BLOCK_T),
            scaling,
            Q,
            T,
            num_rows,
            query_head,
            query_token,
            key_token,
            D,
            BLOCK_D,
        )
        higher = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        largest = higher
    tl.store(sums + pair * num_rows + rows, largest + tl.log(total), mask=rows < num_rows)
