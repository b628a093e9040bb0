"""The split of a pass: model, attention, score, selection, movement, bookkeeping.

Clocks are wrapped round the engine's functions from outside. Each moment counts for the innermost
wrapped function, so the phases of a pass add up to the whole of it. What the clocks themselves cost
is measured beside, as the time with them over the time without.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch

from kvarena.harness.bench.measure import Case, TimedCase, now_sec
from kvarena.harness.bench.sizes import Sizes
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.bench.timed_passes import full_slots, run_passes
from kvarena.harness.engine import Batch, attention, layer_cache
from kvarena.harness.engine.attention import KERNELS
from kvarena.harness.engine.forward_pass import ForwardPass
from kvarena.harness.engine.layer_cache import LayerCache

# model: embeddings, linear layers, norms, output; attention: kernel and mask, with the mass or the
# weights that one softmax yields beside the output; score: the policy, and attention rows computed
# for it alone; selection: protection, ranking, which token fills which hole; movement: writes of
# new and moved tokens; bookkeeping: the rest of the engine, sampling.
PHASES = ("model", "attention", "score", "selection", "movement", "bookkeeping")
FUNCTIONS: tuple[tuple[str, Any, str], ...] = (  # Any: a module or a class
    ("attention", attention, "visible_tokens"),
    ("attention", attention, "attend_with_mass"),
    ("attention", attention, "attend_with_weights"),
    ("score", attention, "last_query_weights"),
    ("score", ForwardPass, "new_tokens"),
    ("score", ForwardPass, "future_queries"),
    ("selection", ForwardPass, "protect"),
    ("selection", LayerCache, "evict"),
    ("movement", LayerCache, "append"),
    ("movement", layer_cache, "move_rows"),
    ("movement", ForwardPass, "move_sinks"),
    ("bookkeeping", ForwardPass, "attend"),
)


class PhaseClock:
    """Seconds by phase. A CUDA device is waited for at every change, which costs overlap."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time counted for ``phase`` but for wrapped ones it calls."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:  # Any: whatever the function takes
            self._switch()
            self._open.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        return timed

    def _switch(self) -> None:
        """Count the time since the last change for the phase that ran."""
        now = now_sec(self._device)
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def clocks(batch: Batch) -> Iterator[PhaseClock]:
    """Clocks round the functions of one batch, taken off again at the end."""
    clock = PhaseClock(batch.device)
    points = (
        *FUNCTIONS,
        ("score", batch.eviction.policy, "score"),
        ("model", batch.model, "forward"),
        ("bookkeeping", batch, "step"),
    )
    with ExitStack() as patches:
        kernels = {name: clock.wrap("attention", kernel) for name, kernel in KERNELS.items()}
        patches.enter_context(mock.patch.dict(KERNELS, kernels))
        for phase, owner, name in points:
            timed = clock.wrap(phase, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, timed))
        yield clock


def phases(subject: Subject, sizes: Sizes) -> list[TimedCase]:
    """A pass that writes in all slots of the jobs, and one that reads a chunk, for each policy."""
    shapes = ((sizes.job_slots, None), (1, sizes.chunk_tokens))
    return [
        _split(subject, policy, sizes, slots, chunk_tokens)
        for slots, chunk_tokens in shapes
        for policy in ("full", *sizes.evicting())
    ]


def _split(
    subject: Subject, policy: str, sizes: Sizes, slots: int, chunk_tokens: int | None
) -> TimedCase:
    passes = sizes.passes

    def warm_batch() -> Batch:
        batch = full_slots(
            subject,
            policy,
            slots=slots,
            cache_tokens=sizes.budget_tokens,
            passes=passes + 1,
            chunk_tokens=chunk_tokens,
        )
        run_passes(batch, 1)
        return batch

    def run() -> dict[str, float]:
        pass_sec = run_passes(warm_batch(), passes)
        batch = warm_batch()  # anew, for a cache that keeps everything has grown meanwhile
        with clocks(batch) as clock:
            timed_sec = run_passes(batch, passes)
        return {
            "pass_sec": pass_sec,
            "clock_overhead_ratio": timed_sec / pass_sec - 1,
            **{f"{phase}_sec": clock.seconds[phase] / passes for phase in PHASES},
        }

    return TimedCase(
        case=Case(
            section="phases",
            what="decode" if chunk_tokens is None else "prefill",
            policy=policy,
            attention="sdpa",
            chunk_tokens=chunk_tokens,
            slots=slots,
            cache_tokens=sizes.budget_tokens,
        ),
        run=run,
    )
