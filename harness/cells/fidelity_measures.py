"""How far two caches are apart over one answer: in logits, and in the attention that was kept.

The queries of an answer are those whose logits choose its tokens: the last token of the prompt and
every token of the answer but the last.

Shape letters: L layers, H query heads, K KV heads, G query heads per KV head, T cached tokens,
A answer tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvarena.harness.engine import KeptTokens
from kvarena.policies.base import LayerView, Needs, Policy


def compare(full: Tensor, policy: Tensor, token_ids: Sequence[int]) -> dict[str, Any]:
    """What a row says of two runs over the same answer; full, policy: logits [A, V].

    KL(full || policy) and negative log-likelihoods (nll) are in nats, differences are policy minus
    full, ``score`` is the share of tokens where both would choose the same one.
    """
    log_full, log_policy = (logits.double().log_softmax(dim=-1) for logits in (full, policy))
    weighted = log_full.exp() * (log_full - log_policy)
    # A token that cannot come weighs nothing, also where both logarithms are infinite. Rounding may
    # leave a sum a hair under zero.
    kl = weighted.masked_fill(log_full == float("-inf"), 0).sum(dim=-1).clamp(min=0)
    agrees = full.argmax(dim=-1) == policy.argmax(dim=-1)
    chosen = torch.tensor(token_ids)[:, None]
    nll_full, nll_policy = (-logs.gather(1, chosen)[:, 0] for logs in (log_full, log_policy))
    difference = nll_policy - nll_full
    return {
        "score": float(agrees.double().mean()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "nll_full": float(nll_full.mean()),
        "nll_policy": float(nll_policy.mean()),
        "nll_difference": float(difference.mean()),
        "num_reference_tokens": len(token_ids),
        "kl_per_token": kl.tolist(),
        "agrees_per_token": agrees.int().tolist(),
        "nll_difference_per_token": difference.tolist(),
    }


class RecallProbe(Policy):
    """Keeps everything, and adds up how much attention falls on what another policy had kept.

    prompt_tokens: length of the prompt; history: what the other policy held after every pass over
    prompt and answer. A query could see what was held after the pass before and its own pass's
    tokens up to itself. For one sequence at a time.
    """

    evicts: ClassVar[bool] = False
    # Nothing is evicted, so only a column makes the engine call ``score``.
    columns: ClassVar[tuple[str, ...]] = ("unused",)

    def __init__(self, prompt_tokens: int, history: Sequence[KeptTokens]) -> None:
        super().__init__()
        before = [KeptTokens(seen_tokens=0, positions=[]), *history]
        # By the position of an answer's query, the last one of its pass.
        self._held = {
            after.seen_tokens - 1: held
            for held, after in zip(before, history, strict=False)
            if after.seen_tokens >= prompt_tokens
        }
        self._mass: dict[int, Tensor] = {}  # by layer, [2, H]: on kept tokens, and on all

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=1)

    def score(self, view: LayerView) -> Tensor:
        query = int(view.positions.max())
        if query in self._held:
            assert view.attention is not None, "asked for"
            num_heads, positions = view.positions.shape[1], view.positions[0]
            start, kept = self._held[query].seen_tokens, self._held[query].positions
            visible = torch.zeros(num_heads, query + 1, dtype=torch.bool, device=positions.device)
            if kept:
                for head, own in enumerate(kept[view.layer]):
                    visible[head, own.to(positions.device)] = True
            visible[:, start:] = True
            weights = view.attention[0, :, -1].unflatten(0, (num_heads, -1)).double()  # [K, G, T]
            on_kept = weights * visible.gather(1, positions)[:, None]
            mass = torch.stack([on_kept.sum(dim=-1), weights.sum(dim=-1)]).flatten(1)  # [2, H]
            self._mass[view.layer] = self._mass.get(view.layer, 0) + mass
        return view.positions.float()

    @property
    def shares(self) -> Tensor:
        """Share of the attention of the answer's queries on kept tokens, [L, H] float64."""
        layers = [self._mass[layer].cpu() for layer in sorted(self._mass)]
        on_kept, total = torch.stack(layers, dim=1)
        return on_kept / total
