"""Replayed decoding steps: which steps are, and that answers stay the same.

On a CPU a recording stands for the graph: it runs the step again with what a graph fixes held
fixed, the addresses of its inputs and logits and all numbers of the host.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kvarena.harness.engine import Batch, Engine, Generation
from kvarena.harness.engine.active_request import ActiveRequest
from kvarena.harness.engine.cuda_graphs import GraphedBatch, _Recorded
from kvarena.harness.engine.packing import Portion
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import build, choices, load_choice
from toys import VOCAB, toy_model, toy_prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
PROMPTS = [toy_prompt(120), toy_prompt(75, seed=1), toy_prompt(33, seed=2), toy_prompt(20)]


class Replays:
    """Stands for a CUDA graph; its replay runs the step on the numbers of the recording."""

    def __init__(
        self, batch: Batch, portions: Sequence, step: _Recorded, rows_wanted: Tensor
    ) -> None:
        # Inside a graph positions count up as tensors only, so no number of the host may matter:
        # this one would be out of bounds of whatever it sized.
        def fixed(active: ActiveRequest) -> SimpleNamespace:
            limit = active.limit_after(1, 1)
            return SimpleNamespace(
                num_seen=2**40, limit_after=lambda *_: limit, scores_of_next=lambda _: None
            )

        self._portions = [Portion(slot, fixed(active), tokens) for slot, active, tokens in portions]
        self._batch, self._step, self._rows_wanted = batch, step, rows_wanted

    def replay(self) -> None:
        fixed = self._step.inputs, self._portions, self._rows_wanted
        logits, cohorts = Batch._forward(self._batch, *fixed)
        self._step.logits.copy_(logits)
        self._step.cohorts[:] = cohorts


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """The kind of each replayed step, in order."""
    record, kinds = GraphedBatch._record, []

    def recording(
        batch: GraphedBatch, kind: list, inputs: Tensor, portions: Sequence, rows_wanted: Tensor
    ) -> _Recorded:
        if DEVICE == "cuda":
            step = record(batch, kind, inputs, portions, rows_wanted)
        else:
            logits = torch.empty(len(portions), VOCAB)
            step = _Recorded(
                kind=kind, graph=None, inputs=inputs.clone(), logits=logits, cohorts=[]
            )
            object.__setattr__(step, "graph", Replays(batch, portions, step, rows_wanted))
        replay = step.graph.replay
        counted = SimpleNamespace(replay=lambda: (kinds.append(kind), replay()))
        object.__setattr__(step, "graph", counted)
        return step

    monkeypatch.setattr(GraphedBatch, "_record", recording)
    return kinds


@pytest.mark.parametrize("name", sorted(set(choices("policy")) - {"kvzip", "oracle"}))
def test_replayed_steps_give_the_same_answers(
    name: str, replayed: list[list], toy_heads: None
) -> None:
    """Two jobs, so that the second one's buffers are not those of the first one's recordings."""
    model = toy_model().to(DEVICE)

    def answers(*, graphs: bool) -> list[Generation]:
        policy = build(load_choice("policy", name))
        engine = Engine(model, policy, budget_tokens=48, chunk_tokens=16, slots=2)
        engine.graphs = graphs  # on a CPU the engine refuses them
        options = {"record_history": True, "record_logits": "answer"}
        jobs = [engine.generate(PROMPTS, max_new_tokens=40, **options) for _ in range(2)]
        return [answer for job in jobs for answer in job]

    for one, other in zip(answers(graphs=False), answers(graphs=True), strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.logits, other.logits)
        assert one.kernels == other.kernels
        for left, right in zip(one.kept_history, other.kept_history, strict=True):
            torch.testing.assert_close(left.positions, right.positions)
    if name == "full":
        assert not replayed, "its cache grows, so no two steps are alike"
    else:
        # Two slots at their budget, and one alone at the end; the first step of each is not one.
        assert len({str(kind) for kind in replayed}) >= 2
        assert len(replayed) > 60


def test_graphs_are_refused_where_they_cannot_run() -> None:
    with pytest.raises(
        UsageError, match="graphs=true needs a CUDA device, codec=none, shape=uniform"
    ):
        Engine(toy_model(), build(load_choice("policy", "keydiff")), budget_tokens=32, graphs=True)
