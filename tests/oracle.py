"""The replay oracle: what the engine did with a small cache, redone with a full one.

The engine recorded which positions each head held after each pass. The oracle runs all tokens
in ONE pass of the untouched model with an explicit mask per head that hides exactly what was gone
when each query ran. Its attention is written independently of the engine's. Equal logits then
mean: right positions, right heads, right eviction times, no leak between sequences.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kvarena.harness.engine import Generation


def seen_by_each_query(generation: Generation, num_tokens: int) -> list[Tensor]:
    """Per layer a bool mask [K, num_tokens, num_tokens]: query (row) may see key (column)."""
    assert generation.kept_history is not None
    num_heads = generation.kept_history[0].positions[0].shape[0]
    masks = []
    for layer in range(len(generation.kept_history[0].positions)):
        mask = torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.bool)
        start, kept = 0, torch.empty(num_heads, 0, dtype=torch.long)
        for step in generation.kept_history:
            end = step.seen_tokens
            for head in range(num_heads):
                mask[head, start:end, kept[head]] = True
            mask[:, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
            start, kept = end, step.positions[layer]
        masks.append(mask)
    return masks


def rank_shifts(generation: Generation, num_tokens: int) -> Tensor:
    """[num_tokens]: how many tokens were gone when each query ran (same for all layers)."""
    assert generation.kept_history is not None
    shifts, start, gone = torch.zeros(num_tokens), 0, 0
    for step in generation.kept_history:
        shifts[start : step.seen_tokens] = gone
        start = step.seen_tokens
        gone = step.seen_tokens - step.positions[0].shape[1]
    return shifts.long()


def replay(
    model: PreTrainedModel,
    token_ids: list[int],
    masks: list[Tensor],
    sink_shifts: Tensor | None = None,
    num_sinks: int = 0,
) -> Tensor:
    """Logits [num_tokens, V] of one full pass in which layer l shows only masks[l].

    sink_shifts: for policies that use ranks as positions, how much nearer the first ``num_sinks``
    tokens are to each query. Here the QUERY is rotated back (the engine rotates the key onwards).
    """
    rotary = model.base_model.rotary_emb

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key)
        if sink_shifts is not None:
            moved = _rotate_back(module, query, sink_shifts, rotary)
            logits[..., :num_sinks] = torch.einsum("bhqd,bhkd->bhqk", moved, key[:, :, :num_sinks])
        logits = logits * options["scaling"]
        if options.get("softcap") is not None:
            logits = options["softcap"] * (logits / options["softcap"]).tanh()
        visible = masks[module.layer_idx].repeat_interleave(group, dim=0)
        window = options.get("sliding_window")
        if window is not None:
            places = torch.arange(len(token_ids))
            distance = (places[:, None] - places[None, :]).expand(len(places), -1).clone()
            if sink_shifts is not None:
                distance[:, :num_sinks] -= sink_shifts[:, None]
            visible = visible & (distance < window)
        logits = logits.masked_fill(~visible, float("-inf"))
        if options.get("s_aux") is not None:
            extra = options["s_aux"].view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            weights = torch.cat([logits, extra], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = logits.softmax(dim=-1)
        return torch.einsum("bhqk,bhkd->bqhd", weights, value), None

    AttentionInterface.register("replay_oracle", attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = "replay_oracle"
    try:
        with torch.inference_mode():
            return model(torch.tensor([token_ids]), use_cache=False).logits[0]
    finally:
        model.config._attn_implementation = before


def _rotate_back(module: nn.Module, query: Tensor, shifts: Tensor, rotary: nn.Module) -> Tensor:
    """Queries [1, H, Q, D] as if each stood ``shifts`` positions earlier."""
    layer_type = [module.layer_type] if hasattr(rotary, "layer_types") else []
    cos, sin = rotary(query, torch.stack([shifts, torch.zeros_like(shifts)]), *layer_type)
    scale = cos[1, 0, 0]
    cos, sin = cos[0] / scale, sin[0] / scale  # [Q, D'] (GPT-OSS gives half of D)
    half = cos.shape[-1] if cos.shape[-1] * 2 == query.shape[-1] else cos.shape[-1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    first, second, rest = query.split([half, half, query.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin, rest], dim=-1)
