"""Decoding steps as a CUDA graph: a whole step is launched at once instead of kernel by kernel.

Once every working slot decodes at its full budget, each step does the same work at the same
addresses: append at place N, attend to N + 1 tokens, score, evict one. Such a step is recorded the
second time it occurs (the first one compiles and sets up) and replayed from then on. Tokens and
positions go into two fixed rows; logits come out of a fixed tensor. Sampling and stop checks stay
outside, and so does every step in which a slot reads its prompt or still fills up.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarena.harness.engine import Engine
from kvarena.harness.engine.forward_pass import Run
from kvarena.harness.engine.layer_cache import LayerCache
from kvarena.harness.engine.sequence import Sequence

Work = list[tuple[int, Sequence, list[int]]]


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """kind: what is equal in all steps that may replay it; inputs: [2, S]; logits: [S, V].

    runs: of the recorded step; what a pass observes lies in the graph's own tensors.
    """

    kind: tuple[tuple[int, int], ...]
    layers: list[LayerCache]
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor
    runs: Seq[Run]


class GraphEngine(Engine):
    """An Engine on CUDA whose steady decoding steps are replayed; same answers, same options.

    A model whose forward pass asks the device for a number (most mixtures of experts, rotary
    embeddings that change with the length) cannot be recorded: torch raises an error that says so.
    """

    _recorded: _Recorded | None = None
    _last_kind: tuple[tuple[int, int], ...] | None = None

    def _logits(self, inputs: Tensor, work: Work, rows_wanted: Tensor) -> tuple[Tensor, Seq[Run]]:
        kind = tuple((slot, sequence.num_live) for slot, sequence, _ in work)
        is_steady = all(
            len(tokens) == 1 and sequence.kept_after(1) == sequence.num_live
            for _, sequence, tokens in work
        )
        if not is_steady or len(rows_wanted) < len(work) or self.codec.codes:
            return super()._logits(inputs, work, rows_wanted)
        known = self._recorded
        if known is None or known.kind != kind or known.layers is not self.layers:
            # Let go first: two graphs side by side would need the memory of both.
            self._recorded, is_new = None, self._last_kind != kind
            self._last_kind = kind
            if is_new:
                return super()._logits(inputs, work, rows_wanted)
            known = self._recorded = self._record(kind, inputs, work, rows_wanted)
        known.inputs.copy_(inputs)
        known.graph.replay()
        return known.logits.clone(), known.runs  # the next replay writes over the logits

    def _record(
        self, kind: tuple[tuple[int, int], ...], inputs: Tensor, work: Work, rows_wanted: Tensor
    ) -> _Recorded:
        """Nothing is computed here: the cache stays as it is until the first replay."""
        graph = torch.cuda.CUDAGraph()
        inputs = inputs.clone()
        with torch.cuda.graph(graph):
            logits, runs = super()._logits(inputs, work, rows_wanted)
        return _Recorded(
            kind=kind, layers=self.layers, graph=graph, inputs=inputs, logits=logits, runs=runs
        )
