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

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_DIMS = 256
# Hopper's tensor cores want 64 rows at a time, any of them at least 16. With two stages and float32
# tiles of half the side, a head dim of 256 still fits the shared memory of cards with 99 KiB.
_LEAST = 16
_NUM_STAGES = 2


def serves(query: Tensor) -> bool:
    """Whether the kernels know the data type and head dim of queries [S, H, Q, D]."""
    return query.dtype in _DTYPES and query.shape[-1] <= _MOST_DIMS


def attend_with_mass(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output [S, H, Q, D] and mass [S, K, T] float32; query [S, H, Q, D], the others [S, K, T, D].

    Contiguity is needed along D only.
    """
    output, log_sums = attend(query, keys, values, scaling)
    return output, column_mass(query, keys, log_sums, scaling)


def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
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
    mass = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
    S, K, T = mass.shape
    options = _options(query, keys)
    grid = (triton.cdiv(T, options["BLOCK_T"]), S * K)
    with torch.cuda.device_of(query):
        _column_mass[grid](query, keys, log_sums.contiguous(), mass, scaling, **options)
    return mass


def log_sum_exp(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Log-sum-exp [S, H, Q] float32 of each query's masked logits; shapes as ``column_mass``."""
    sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    options = _options(query, keys)
    grid = (triton.cdiv(options["num_rows"], options["BLOCK_R"]), keys.shape[0] * keys.shape[1])
    with torch.cuda.device_of(query):
        _log_sum_exp[grid](query, keys, sums, scaling, **options)
    return sums


def _options(query: Tensor, keys: Tensor) -> dict[str, int]:
    """What both kernels are told of their tensors' shapes and strides."""
    H, Q, D = query.shape[1:]
    K, T = keys.shape[1:3]
    assert query.dtype == keys.dtype, f"queries in {query.dtype}, keys in {keys.dtype}"
    assert query.stride(-1) == keys.stride(-1) == 1, "queries and keys must be contiguous along D"
    num_rows = H // K * Q
    tile = 64 if query.itemsize == 2 else 32
    return {
        "num_queries": Q,
        "num_places": T,
        "num_rows": num_rows,
        "query_sequence": query.stride(0),
        "query_head": query.stride(1),
        "query_token": query.stride(2),
        "key_sequence": keys.stride(0),
        "key_head": keys.stride(1),
        "key_token": keys.stride(2),
        "K": K,
        "D": D,
        "BLOCK_R": _LEAST if num_rows <= _LEAST else tile,
        "BLOCK_T": tile,
        "BLOCK_D": max(triton.next_power_of_2(D), _LEAST),
        "num_stages": _NUM_STAGES,
    }


@triton.jit
def _queries(
    query: tl.tensor,
    rows: tl.tensor,
    num_queries: tl.tensor,
    num_rows: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """[rows, D] of one KV head's group, 0 beyond what there is."""
    dims = tl.arange(0, BLOCK_D)
    starts = (rows // num_queries) * query_head + (rows % num_queries) * query_token
    inside = (rows < num_rows)[:, None] & (dims < D)[None, :]
    return tl.load(query + starts[:, None] + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _keys(
    keys: tl.tensor,
    places: tl.tensor,
    num_places: tl.tensor,
    key_token: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """[D, places] of one KV head, 0 beyond what there is."""
    dims = tl.arange(0, BLOCK_D)
    inside = (places < num_places)[None, :] & (dims < D)[:, None]
    return tl.load(keys + places[None, :] * key_token + dims[:, None], mask=inside, other=0.0)


@triton.jit
def _logits(
    queries: tl.tensor,
    keys: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    scaling: tl.tensor,
    num_queries: tl.tensor,
    num_places: tl.tensor,
) -> tl.tensor:
    """[rows, places], -inf where a row may not look: beyond its own place."""
    # Without "ieee", float32 products would be rounded to tf32's 10 bits on the tensor cores.
    logits = tl.dot(queries, keys, input_precision="ieee") * scaling
    own = num_places - num_queries + rows % num_queries
    return tl.where(places[None, :] <= own[:, None], logits, float("-inf"))


@triton.jit
def _column_mass(
    query: tl.tensor,
    keys: tl.tensor,
    log_sums: tl.tensor,
    mass: tl.tensor,
    scaling: tl.tensor,
    num_queries: tl.tensor,
    num_places: tl.tensor,
    num_rows: tl.tensor,
    query_sequence: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    key_sequence: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program: a tile of places of one KV head, over all its rows."""
    pair = tl.program_id(1).to(tl.int64)  # a cache may have more than 2^31 elements
    sequence, head = pair // K, pair % K
    query += sequence * query_sequence + head * (num_rows // num_queries) * query_head
    keys += sequence * key_sequence + head * key_head
    places = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    held = _keys(keys, places, num_places, key_token, D, BLOCK_D)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for first in range(0, num_rows, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        asked = _queries(query, rows, num_queries, num_rows, query_head, query_token, D, BLOCK_D)
        logits = _logits(asked, held, rows, places, scaling, num_queries, num_places)
        # exp(logit - inf) = 0: rows beyond the last give nothing.
        log_sum = tl.load(
            log_sums + pair * num_rows + rows, mask=rows < num_rows, other=float("inf")
        )
        total += tl.sum(tl.exp(logits - log_sum[:, None]), axis=0)
    tl.store(mass + pair * num_places + places, total, mask=places < num_places)


@triton.jit
def _log_sum_exp(
    query: tl.tensor,
    keys: tl.tensor,
    sums: tl.tensor,
    scaling: tl.tensor,
    num_queries: tl.tensor,
    num_places: tl.tensor,
    num_rows: tl.tensor,
    query_sequence: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    key_sequence: tl.tensor,
    key_head: tl.tensor,
    key_token: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program: a tile of one KV head's rows, over all places; a running maximum and sum."""
    pair = tl.program_id(1).to(tl.int64)
    sequence, head = pair // K, pair % K
    query += sequence * query_sequence + head * (num_rows // num_queries) * query_head
    keys += sequence * key_sequence + head * key_head
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    asked = _queries(query, rows, num_queries, num_rows, query_head, query_token, D, BLOCK_D)
    # Every row sees place 0, so the first tile makes the maximum finite.
    largest = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for first in range(0, num_places, BLOCK_T):
        places = first + tl.arange(0, BLOCK_T)
        held = _keys(keys, places, num_places, key_token, D, BLOCK_D)
        logits = _logits(asked, held, rows, places, scaling, num_queries, num_places)
        higher = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        largest = higher
    tl.store(sums + pair * num_rows + rows, largest + tl.log(total), mask=rows < num_rows)
