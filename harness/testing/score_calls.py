"""What a policy's ``score`` got and gave while an engine ran, and the same once more, reordered.

Shape letters as in ``policies/base.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvarena.harness.testing.faults import ContractError
from kvarena.policies.base import LayerView, Policy

_READ_ONLY = ("stored_keys", "stored_values", "positions")


@dataclass(frozen=True, kw_only=True)
class Call:
    """view: a copy of what ``score`` got; scores: what it gave; written: parts that it changed."""

    where: str
    view: LayerView
    scores: Tensor
    written: list[str]


@dataclass
class Watch:
    """Listens to the ``score`` of a policy; the first result that is no score ends the run.

    fault: what was wrong with that result; where: layer and pass of the last call.
    """

    policy: Policy
    calls: list[Call] = field(default_factory=list)
    fault: ContractError | None = None
    where: str = ""
    _num_passes: int = 0

    def __post_init__(self) -> None:
        self._score = self.policy.score
        self.policy.score = self._listen  # type: ignore[method-assign]

    def count_pass(self, num_tokens: int) -> None:
        """To be told of each pass of the engine."""
        self._num_passes += 1

    def _listen(self, view: LayerView) -> Tensor:
        self.where = f"in layer {view.layer}, pass {self._num_passes + 1}"
        before = copied(view)
        scores = self._score(view)
        self.fault = _fault_of(scores, view.positions, self.where)
        if self.fault:
            raise self.fault
        written = [
            name
            for name in _READ_ONLY
            if not torch.equal(getattr(before, name), getattr(view, name))
        ]
        self.calls.append(
            Call(where=self.where, view=before, scores=scores.clone(), written=written)
        )
        # The run goes on; the calls keep what was given.
        return scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _fault_of(scores: Any, positions: Tensor, where: str) -> ContractError | None:
    """Any: whatever a policy may return."""
    wanted = f"a float tensor [S, K, T] = {list(positions.shape)}, one score for each token"
    if not isinstance(scores, Tensor):
        return ContractError(f"score returned {type(scores).__name__} {where}", wanted)
    if scores.shape != positions.shape:
        return ContractError(f"score returned a tensor {list(scores.shape)} {where}", wanted)
    if not scores.is_floating_point():
        return ContractError(f"score returned a tensor of {scores.dtype} {where}", wanted)
    return None


def copied(view: LayerView) -> LayerView:
    """The view with tensors of its own."""
    return _mapped(view, Tensor.clone, Tensor.clone, Tensor.clone)


def other_order(positions: Tensor, num_new: int, generator: torch.Generator) -> Tensor:
    """[S, K, T]: another place for each kept token; heads that store the same keep doing so."""
    S, K, T = positions.shape
    is_alike = torch.equal(positions, positions[:, :1].expand_as(positions))
    kept = torch.rand(S, 1 if is_alike else K, T - num_new, generator=generator).argsort(dim=-1)
    new = torch.arange(T - num_new, T)
    return torch.cat([kept.expand(S, K, -1), new.expand(S, K, -1)], dim=-1)


def reordered(view: LayerView, order: Tensor) -> LayerView:
    """The same tokens in the storage order ``order`` [S, K, T]; the new ones must stay last."""

    def vectors(stored: Tensor) -> Tensor:  # [S, K, T, D]
        return stored.gather(2, order[..., None].expand_as(stored))

    def numbers(column: Tensor) -> Tensor:  # [S, K, T]
        return column.gather(-1, order)

    def weights(attention: Tensor) -> Tensor:  # [S, H, W, T]
        of_heads = order.repeat_interleave(attention.shape[1] // order.shape[1], dim=1)
        return attention.gather(-1, of_heads[:, :, None].expand_as(attention))

    return _mapped(view, vectors, numbers, weights)


Change = Callable[[Tensor], Tensor]


def _mapped(view: LayerView, vectors: Change, numbers: Change, weights: Change) -> LayerView:
    """The view with its stored vectors, its numbers per token and its attention changed."""
    mass, norms = view.attention_mass, view.output_norms
    return replace(
        view,
        stored_keys=vectors(view.stored_keys),
        stored_values=vectors(view.stored_values),
        positions=numbers(view.positions),
        attention=None if view.attention is None else weights(view.attention),
        attention_mass=None if mass is None else numbers(mass),
        output_norms=None if norms is None else numbers(norms),
        columns={name: numbers(column) for name, column in view.columns.items()},
    )
