"""Replayed decoding steps: which steps are, and that answers stay the same.

On a CPU a recording stands for the graph: it runs the step again with what a graph fixes held
fixed, the addresses of its inputs and logits and all numbers of the host.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kvarena.harness.engine import Engine
from kvarena.harness.engine.cuda_graphs import GraphEngine, Work, _Recorded
from kvarena.harness.engine.sequence import Generation, Sequence
from kvarena.harness.registry import build, choices, load_choice
from toys import VOCAB, toy_model, toy_prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
PROMPTS = [toy_prompt(120), toy_prompt(75, seed=1), toy_prompt(33, seed=2), toy_prompt(20)]


class Replays:
    """Stands for a CUDA graph; its replay runs the step on the numbers of the recording."""

    def __init__(self, engine: Engine, work: Work, step: _Recorded, rows_wanted: Tensor) -> None:
        # Inside a graph positions count up as tensors only, so no number of the host may matter:
        # this one would be out of bounds of whatever it sized.
        def fixed(sequence: Sequence) -> SimpleNamespace:
            kept, limit = sequence.kept_after(1), sequence.limit_after(1)
            numbers = {"num_live": sequence.num_live, "num_seen": 2**40}
            return SimpleNamespace(
                **numbers, kept_after=lambda _: kept, limit_after=lambda _: limit
            )

        self._work = [(slot, fixed(sequence), tokens) for slot, sequence, tokens in work]
        self._engine, self._step, self._rows_wanted = engine, step, rows_wanted

    def replay(self) -> None:
        fixed = self._step.inputs, self._work, self._rows_wanted
        logits, runs = Engine._logits(self._engine, *fixed)
        self._step.logits.copy_(logits)
        self._step.runs[:] = runs


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The kind of each replayed step, in order."""
    record, kinds = GraphEngine._record, []

    def recording(
        engine: GraphEngine, kind: tuple, inputs: Tensor, work: Work, rows_wanted: Tensor
    ) -> _Recorded:
        if DEVICE == "cuda":
            step = record(engine, kind, inputs, work, rows_wanted)
        else:
            fixed = {"inputs": inputs.clone(), "logits": torch.empty(len(work), VOCAB), "runs": []}
            step = _Recorded(kind=kind, layers=engine.layers, graph=None, **fixed)
            object.__setattr__(step, "graph", Replays(engine, work, step, rows_wanted))
        replay = step.graph.replay
        counted = SimpleNamespace(replay=lambda: (kinds.append(kind), replay()))
        object.__setattr__(step, "graph", counted)
        return step

    monkeypatch.setattr(GraphEngine, "_record", recording)
    return kinds


@pytest.mark.parametrize("name", choices("policy"))
def test_replayed_steps_give_the_same_answers(
    name: str, replayed: list[tuple], toy_heads: None
) -> None:
    """Two jobs, so that the second one's buffers are not those of the first one's recordings."""
    model = toy_model().to(DEVICE)

    def answers(kind: type[Engine]) -> list[Generation]:
        policy = build(load_choice("policy", name))
        engine = kind(model, policy, budget_tokens=48, chunk_tokens=16, slots=2)
        options = {"record_history": True, "record_logits": "answer"}
        jobs = [engine.generate(PROMPTS, max_new_tokens=40, **options) for _ in range(2)]
        return [answer for job in jobs for answer in job]

    for one, other in zip(answers(Engine), answers(GraphEngine), strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.logits, other.logits)
        assert one.kernels == other.kernels
        for left, right in zip(one.kept_history, other.kept_history, strict=True):
            torch.testing.assert_close(left.positions, right.positions)
    if name == "full":
        assert not replayed, "its cache grows, so no two steps are alike"
    else:
        # Two slots at their budget, and one alone at the end; the first step of each is not one.
        assert len(set(replayed)) >= 2
        assert len(replayed) > 60
