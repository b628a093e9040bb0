"""The replay oracle: what an eviction engine did with a small cache, redone with a full one.

An engine tells which positions each head held after each pass. The oracle runs all tokens in ONE
pass of the untouched model with an explicit mask per head that hides exactly what was gone when
each query ran. Its attention is written independently of any engine's. Equal logits then mean:
right positions, right heads, right eviction times, no leak between sequences.

Shape letters: K KV heads, T tokens held, N tokens in all, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel


class Held(Protocol):
    """What one sequence held after a pass, ``seen_tokens`` of its text having been fed so far.

    positions: per layer and KV head the places in the text of the tokens held, integers in any
    order: [K, T], or K tensors where heads hold different numbers of tokens.
    """

    @property
    def seen_tokens(self) -> int: ...

    @property
    def positions(self) -> Sequence[Iterable[Tensor]]: ...


def replay_difference(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    held: Sequence[Held],
    logits: Tensor,
    *,
    num_rank_sinks: int | None = None,
) -> float:
    """The largest difference between an engine's ``logits`` [N, V] and those of the replay.

    held: after every pass, in order; the last one has seen all ``token_ids``. num_rank_sinks: for
    an engine that takes ranks inside the cache as positions, how many first tokens stand right
    before the newest (StreamingLLM: 4); None: original positions. Raises ValueError for what
    cannot have been: ``held`` without all tokens, or ranks with a gap among the newest tokens.
    """
    return float((logits - replay(model, token_ids, held, num_rank_sinks)).abs().max())


def replay(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    held: Sequence[Held],
    num_rank_sinks: int | None = None,
) -> Tensor:
    """Logits [N, V] of one full pass in which each query sees what was held when it ran."""
    num_tokens = len(token_ids)
    if not held or held[-1].seen_tokens != num_tokens:
        seen = held[-1].seen_tokens if held else 0
        raise ValueError(f"the passes have seen {seen} tokens, not the {num_tokens} of the text")
    masks = _seen_by_each_query(held, num_tokens)
    shifts = None
    if num_rank_sinks is not None:
        shifts = _rank_shifts(held, num_tokens, num_rank_sinks)
    rotary = model.base_model.rotary_emb

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key)
        if shifts is not None:
            # Here the QUERY is rotated back, where an engine rotates the key onwards.
            moved, near = _rotate_back(module, query, shifts, rotary), key[:, :, :num_rank_sinks]
            scores[..., :num_rank_sinks] = torch.einsum("bhqd,bhkd->bhqk", moved, near)
        scores = scores * options["scaling"]
        if options.get("softcap") is not None:
            scores = options["softcap"] * (scores / options["softcap"]).tanh()
        index = module.layer_idx
        assert isinstance(index, int)
        visible = masks[index].repeat_interleave(group, dim=0)
        window = options.get("sliding_window")
        if window is not None:
            places = torch.arange(num_tokens)
            distance = (places[:, None] - places[None, :]).expand(num_tokens, -1).clone()
            if shifts is not None:
                distance[:, :num_rank_sinks] -= shifts[:, None]
            visible = visible & (distance < window)
        scores = scores.masked_fill(~visible, float("-inf"))
        if options.get("s_aux") is not None:
            extra = options["s_aux"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        return torch.einsum("bhqk,bhkd->bqhd", weights, value), None

    AttentionInterface.register("replay_oracle", attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = "replay_oracle"
    try:
        with torch.inference_mode():
            return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    finally:
        model.config._attn_implementation = before


def _seen_by_each_query(held: Sequence[Held], num_tokens: int) -> list[Tensor]:
    """Per layer a bool mask [K, N, N]: query (row) may see key (column)."""
    masks = []
    for layer in range(len(held[0].positions)):
        num_heads = len(list(held[0].positions[layer]))
        mask = torch.zeros(num_heads, num_tokens, num_tokens, dtype=torch.bool)
        start, kept = 0, [torch.empty(0, dtype=torch.long)] * num_heads
        for step in held:
            end = step.seen_tokens
            for head, positions in enumerate(kept):
                mask[head, start:end, positions] = True
            mask[:, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
            start, kept = end, list(step.positions[layer])
        masks.append(mask)
    return masks


def _rank_shifts(held: Sequence[Held], num_tokens: int, num_sinks: int) -> Tensor:
    """[N]: how many tokens were gone when each query ran, the same for all layers and heads.

    So much nearer to the query the sinks then are. Raises ValueError where other tokens are gone
    than those between the sinks and an unbroken run of the newest.
    """
    shifts, start, gone = torch.zeros(num_tokens), 0, 0
    for step in held:
        shifts[start : step.seen_tokens] = gone
        kept = [head.sort().values for heads in step.positions for head in heads]
        start, gone = step.seen_tokens, step.seen_tokens - len(kept[0])
        places = torch.arange(step.seen_tokens)
        expected = places[(places < num_sinks) | (places >= gone + num_sinks)]
        if not all(torch.equal(head, expected) for head in kept):
            raise ValueError(
                f"ranks as positions need the first {num_sinks} tokens and an unbroken run of the "
                f"newest ones in every head; after {step.seen_tokens} tokens some held others"
            )
    return shifts.long()


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
