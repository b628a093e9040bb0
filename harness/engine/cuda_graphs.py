"""Decoding steps as a CUDA graph: a whole step is launched at once instead of kernel by kernel.

Once every working slot decodes at its full budget, each step does the same work at the same
addresses: append at place N, attend to N + 1 tokens, score, evict one. Such a step is recorded the
second time it occurs (the first one compiles and sets up) and replayed from then on. Tokens and
positions go into two fixed rows; logits come out of a fixed tensor. Sampling and stop checks stay
outside, and so does every step in which a slot reads its prompt or still fills up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.harness.engine.batch import Batch
from kvarena.harness.engine.packing import Cohort, Portion

Kind = list[tuple[int, list[list[int]]]]  # by slot: what each head of each layer holds


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """kind: what is equal in all steps that may replay it; inputs: [2, S]; logits: [S, V].

    cohorts: of the recorded step; what a pass observes lies in the graph's own tensors.
    """

    kind: Kind
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor
    cohorts: Sequence[Cohort]


class GraphedBatch(Batch):
    """A Batch on CUDA whose steady decoding steps are replayed; the same answers.

    A model whose forward pass asks the device for a number (most mixtures of experts, rotary
    embeddings that change with the length) cannot be recorded: torch raises an error that says so.
    """

    _recorded: _Recorded | None = None
    _last_kind: Kind | None = None

    def _forward(
        self, inputs: Tensor, portions: Sequence[Portion], rows_wanted: Tensor
    ) -> tuple[Tensor, Sequence[Cohort]]:
        kind = [
            (slot, [layer.held_tokens(slot) for layer in self.layers]) for slot, _, _ in portions
        ]
        if len(rows_wanted) < len(portions) or not all(map(self._is_steady, portions)):
            return super()._forward(inputs, portions, rows_wanted)
        known = self._recorded
        if known is None or known.kind != kind:
            # Let go first: two graphs side by side would need the memory of both.
            self._recorded, is_new = None, self._last_kind != kind
            self._last_kind = kind
            if is_new:
                return super()._forward(inputs, portions, rows_wanted)
            known = self._recorded = self._record(kind, inputs, portions, rows_wanted)
        known.inputs.copy_(inputs)
        known.graph.replay()
        return known.logits.clone(), known.cohorts  # the next replay writes over the logits

    def _is_steady(self, portion: Portion) -> bool:
        """Whether the slot writes, at its budget in every head: as much goes as comes."""
        limit = portion.active.limit_after(1, self.eviction.every)
        held = {count for layer in self.layers for count in layer.held_tokens(portion.slot)}
        return len(portion.token_ids) == 1 and limit is not None and held == {limit.tokens}

    def _record(
        self, kind: Kind, inputs: Tensor, portions: Sequence[Portion], rows_wanted: Tensor
    ) -> _Recorded:
        """Nothing is computed here: the cache stays as it is until the first replay."""
        graph = torch.cuda.CUDAGraph()
        inputs = inputs.clone()
        with torch.cuda.graph(graph):
            logits, cohorts = super()._forward(inputs, portions, rows_wanted)
        return _Recorded(kind=kind, graph=graph, inputs=inputs, logits=logits, cohorts=cohorts)
