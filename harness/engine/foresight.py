"""What a reference may know that a policy may not: how much the text to come looks at each token.

A policy with ``needs.token_scores`` is no method but a yardstick: before a request begins, the full
cache reads it once and notes the attention that each token gets later, per layer and KV head. Those
numbers travel with the tokens as the column TOKEN_SCORE. Its memory is not bounded while it looks
ahead, so such a policy says ``bounded = False``.

Shape letters: L layers, H query heads, K KV heads, G = H/K, W queries, T tokens held, N tokens fed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvarena.harness.engine.request import Request
from kvarena.policies.base import LayerView, Needs, Policy

Reader = Callable[[Policy, Request], None]  # runs one request under a policy, to its end


def token_scores(request: Request, kind: str, chunk_tokens: int, read: Reader) -> Tensor:
    """[L, K, N] float32 of a settled request: scores of its tokens, see ``Needs.token_scores``.

    read: runs the request under the policy it is given, which keeps everything.
    """
    num_prompt = len(request.prompt)
    if kind == "answer":
        watch = _Watch(first_query=num_prompt - 1, rows=1)
        read(watch, replace(request, budget_tokens=None))
        return watch.scores
    assert kind == "repeat", kind
    watch = _Watch(first_query=num_prompt, rows=chunk_tokens, by_mean=False)
    again = [*request.prompt, *request.prompt]
    read(watch, replace(request, prompt=again, forced=None, max_new_tokens=1, budget_tokens=None))
    return watch.scores[..., :num_prompt]


@dataclass(kw_only=True)
class _Watch(Policy):
    """Keeps everything, and notes the attention of later queries. For one sequence at a time.

    first_query: position from which on queries count; rows: how many a pass may have of them.
    by_mean: their attention is added up over queries and group; else its maximum is taken.
    """

    evicts: ClassVar[bool] = False
    # Nothing is evicted, so only a column makes the engine call ``score``.
    columns: ClassVar[tuple[str, ...]] = ("unused",)

    first_query: int
    rows: int
    by_mean: bool = True
    _by_layer: dict[int, Tensor] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.rows)

    def score(self, view: LayerView) -> Tensor:
        assert view.attention is not None, "asked for"
        _, K, T = view.positions.shape
        last = int(view.positions.max())
        num_queries = min(view.attention.shape[2], last + 1 - self.first_query)
        if num_queries > 0:
            weights = view.attention[0, :, -num_queries:].unflatten(0, (K, -1))  # [K, G, W, T]
            own = weights.sum(dim=(1, 2)) if self.by_mean else weights.amax(dim=(1, 2))  # [K, T]
            seen = own.new_zeros(K, T).scatter_(1, view.positions[0], own)
            before = self._by_layer.get(view.layer)
            if before is not None:
                old = seen[:, : before.shape[1]]
                old.copy_(old + before if self.by_mean else torch.maximum(old, before))
            self._by_layer[view.layer] = seen
        return view.positions.float()

    @property
    def scores(self) -> Tensor:
        return torch.stack([self._by_layer[layer] for layer in sorted(self._by_layer)]).float()
