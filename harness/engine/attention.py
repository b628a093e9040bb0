"""Attention kernels: the same arithmetic three ways, and the statistics a policy may ask for.

Shape letters: S sequences, H query heads, K KV heads, G = H/K, Q query tokens, T cached tokens (the
last Q of them are this pass's own), D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from kvarena.harness.engine.flash_source import flash_attn_func
from kvarena.harness.errors import UsageError
from kvarena.policies.base import at_least_float32


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer of a model asks of its attention, as transformers passes it.

    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
    sink_logits: [H], one extra logit per head that takes weight and gives nothing (GPT-OSS).
    sliding_window: a query sees only tokens less than so many positions back (Mistral, Gemma 3).
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    sliding_window: int | None = None

    def of_heads(self, query_heads: slice) -> "AttentionSpec":
        """What it asks of some of the layer's query heads."""
        if self.sink_logits is None:
            return self
        return replace(self, sink_logits=self.sink_logits[query_heads])

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sink_logits is None

    @property
    def is_causal_only(self) -> bool:
        """Whether a query sees every place up to its own, with nothing done to the logits."""
        return self.is_plain and self.sliding_window is None


def visible_tokens(
    query_positions: Tensor, key_positions: Tensor, num_queries: int, sliding_window: int | None
) -> Tensor | None:
    """Which of T tokens each of Q queries sees: bool, broadcastable to [S, K, Q, T]; None for all.

    Kept tokens come before the pass's own in storage, so a query sees every place up to its own: a
    causal mask aligned to the lower right. A sliding window hides what is too far back in the text.
    query_positions: [S, Q]; key_positions: [S, K, T].
    """
    num_tokens = key_positions.shape[-1]
    mask = None
    if num_queries > 1:
        mask = torch.ones(
            num_queries, num_tokens, dtype=torch.bool, device=key_positions.device
        ).tril(num_tokens - num_queries)[None, None]
    if sliding_window is not None:
        # Compared without a difference, which would be eight times the size of the mask.
        horizon = query_positions[:, None, :, None] - sliding_window
        near = key_positions[:, :, None, :] > horizon
        mask = near if mask is None else mask & near
    return mask


def explicit_weights(
    query: Tensor, keys: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """Softmax weights [S, K, G, Q, T], float32 or wider; query [S, H, Q, D], keys [S, K, T, D]."""
    # Half precision would round the logits before the softmax, far worse than sdpa does.
    query, keys = at_least_float32(query), at_least_float32(keys)
    S, H, Q, _ = query.shape
    K, T = keys.shape[1:3]
    # The queries are scaled, which are fewer than the logits.
    grouped = (query * spec.scaling).reshape(S, K, -1, query.shape[-1])  # [S, K, G*Q, D]
    logits = (grouped @ keys.transpose(-1, -2)).view(S, K, H // K, Q, T)
    if spec.softcap is not None:
        logits = torch.tanh(logits / spec.softcap) * spec.softcap
    if mask is not None:
        # On a CPU, adding minus infinity takes a fifth of the time of filling it in.
        hidden = torch.zeros(mask.shape, dtype=logits.dtype, device=mask.device)
        logits += hidden.masked_fill_(~mask, float("-inf"))[:, :, None]
    if spec.sink_logits is None:
        return logits.softmax(dim=-1)
    sinks = spec.sink_logits.to(logits.dtype).view(1, K, -1, 1, 1).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """Attention output [S, H, Q, D] of weights [S, K, G, Q, T] over values [S, K, T, D]."""
    S, K, G, Q, T = weights.shape
    mixed = weights.to(values.dtype).view(S, K, G * Q, T) @ values
    return mixed.view(S, K * G, Q, -1)


def attend_reference(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """Plain torch, every weight written out. Honours everything; the yardstick for the others."""
    return weighted_values(explicit_weights(query, keys, mask, spec), values)


def attend_sdpa(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """torch's scaled_dot_product_attention; raises UsageError for soft-cap and sink logits.

    On CUDA in half precision that is torch's own FlashAttention, unless a sliding window needs the
    mask.
    """
    if not spec.is_plain:
        raise UsageError(
            "attention=sdpa cannot apply this model's logit soft-cap or attention sinks; "
            "use attention=reference"
        )
    S, H, Q, D = query.shape
    K, T = keys.shape[1:3]
    if Q == 1:
        # The group becomes the query axis, so no key is repeated: 5-20x cheaper than repeat_kv.
        packed = F.scaled_dot_product_attention(
            query.view(S, K, H // K, D), keys, values, attn_mask=mask, scale=spec.scaling
        )
        return packed.view(S, H, 1, -1)
    if query.is_cuda and spec.sliding_window is None:
        # Any mask keeps torch from FlashAttention, except this one, which only names itself.
        mask = causal_lower_right(Q, T)
    elif mask is not None and mask.shape[1] == K and K != H:
        mask = mask.repeat_interleave(H // K, dim=1)
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=spec.scaling, enable_gqa=H != K
    )


def attend_flash(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """FlashAttention 2, whose causal mask is aligned to the lower right; CUDA, half precision."""
    if spec.sink_logits is not None or spec.sliding_window is not None:
        raise UsageError(
            "attention=flash cannot apply this model's attention sinks or sliding window to an "
            "evicted cache; use attention=sdpa or attention=reference"
        )
    output = flash_attn_func()(
        query.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        softmax_scale=spec.scaling,
        causal=True,
        softcap=spec.softcap or 0.0,
    )
    return output.transpose(1, 2)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionSpec], Tensor]

KERNELS: dict[str, Kernel] = {
    "sdpa": attend_sdpa,
    "flash": attend_flash,
    "reference": attend_reference,
}


def attend_with_mass(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    spec: AttentionSpec,
    *,
    may_fuse: bool,
) -> tuple[Tensor, Tensor, str]:
    """Output [S, H, Q, D], the attention mass [S, K, T] each key received, and what computed them.

    may_fuse: on CUDA, weights are not written out if Triton can be told all of the mask
    (triton_mass.py): "triton". Otherwise they are: "reference", for one sequence at a time when
    Q > 1, so that they stay at [H, Q, T].
    """
    if may_fuse and query.is_cuda and spec.is_causal_only:
        from kvarena.harness.engine import triton_mass  # Triton comes with the CUDA builds of torch

        if triton_mass.serves(query):
            return *triton_mass.attend_with_mass(query, keys, values, spec.scaling), "triton"
    if query.shape[2] > 1 and query.shape[0] > 1:
        parts = [
            attend_with_mass(
                *one, None if mask is None else mask[i % mask.shape[0]][None], spec, may_fuse=False
            )
            for i, one in enumerate(
                zip(query.split(1), keys.split(1), values.split(1), strict=True)
            )
        ]
        outputs, masses, _ = zip(*parts, strict=True)
        return torch.cat(outputs), torch.cat(masses), "reference"
    weights = explicit_weights(query, keys, mask, spec)
    return weighted_values(weights, values), weights.sum(dim=(2, 3)), "reference"


def attend_with_weights(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """Output [S, H, Q, D] and the softmax weights [S, H, Q, T] of all queries it was made with."""
    weights = explicit_weights(query, keys, mask, spec)
    return weighted_values(weights, values), weights.flatten(1, 2)


def last_query_weights(
    query: Tensor, keys: Tensor, mask: Tensor | None, spec: AttentionSpec, num_rows: int
) -> Tensor:
    """Softmax weights [S, H, W, T] of the last W = min(num_rows, Q) queries."""
    rows = min(num_rows, query.shape[2])
    if mask is not None:
        mask = mask[:, :, -rows:]
    return explicit_weights(query[:, :, -rows:], keys, mask, spec).flatten(1, 2)
