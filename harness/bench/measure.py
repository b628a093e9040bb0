"""Fair times: everything warm, in interleaved rounds, as medians with quartiles.

A machine's speed drifts with its neighbours and its heat. So a round visits all cases in turn,
every other round backwards, and a ratio is formed within each round before its median is taken.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from time import perf_counter

import pandas as pd
import torch

Metrics = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one measurement is of; None where a label means nothing.

    section, what: part of the bench, and the work; system: kvarena, generate (transformers),
    dynamic_cache (transformers' model called in a loop), kvpress or machine.
    evict_every: decoding passes between two evictions; beside: what else the processor has to do;
    waiting: OpenMP's settings, where they are what is compared.
    """

    section: str
    what: str
    system: str = "kvarena"
    policy: str | None = None
    codec: str | None = None
    attention: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    budget_tokens: int | None = None
    chunk_tokens: int | None = None
    slots: int | None = None
    cache_tokens: int | None = None
    evict_every: int | None = None
    beside: str | None = None
    waiting: str | None = None


LABELS = [label.name for label in fields(Case)]


@dataclass(frozen=True, kw_only=True)
class TimedCase:
    """A case and how to measure it once; units end the names of metrics.

    warm: runs every shape of ``run`` once; what it returns (memory, say) is kept as well.
    """

    case: Case
    run: Callable[[], Metrics]
    warm: Callable[[], Metrics] = field(default=dict)


def measure(cases: Sequence[TimedCase], rounds: int) -> pd.DataFrame:
    """One line per case, metric and round, with its value; round 0 is the warm-up's."""
    lines: list[dict[str, object]] = []

    def note(timed: TimedCase, number: int, metrics: Metrics) -> None:
        labels = asdict(timed.case)
        lines.extend(
            labels | {"round": number, "metric": name, "value": value}
            for name, value in metrics.items()
        )

    started = perf_counter()
    # The process's very first work maps libraries and fills pools, which is no case's memory.
    cases[0].warm()
    for timed in cases:
        note(timed, 0, timed.warm())
    for number in range(1, rounds + 1):
        for timed in cases if number % 2 else reversed(cases):
            note(timed, number, timed.run())
        passed_sec = perf_counter() - started
        sections = ", ".join(dict.fromkeys(timed.case.section for timed in cases))
        print(
            f"{sections}: round {number} of {rounds}, {passed_sec:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return pd.DataFrame(lines, columns=[*LABELS, "round", "metric", "value"])


def summarise(measured: pd.DataFrame) -> pd.DataFrame:
    """One line per case and metric: median, q1, q3 (quartiles) and the number of rounds."""
    groups = measured.groupby([*LABELS, "metric"], sort=False, dropna=False)["value"]
    quartiles = {
        name: groups.quantile(q) for name, q in (("median", 0.5), ("q1", 0.25), ("q3", 0.75))
    }
    return pd.DataFrame(quartiles | {"rounds": groups.size()}).reset_index()


def select(measured: pd.DataFrame, metric: str, **labels: object) -> pd.Series:
    """Values by round of the one case that has these labels; empty if it was not measured."""
    wanted = measured["metric"] == metric
    for name, value in labels.items():
        wanted &= measured[name] == value
    found = measured[wanted]
    assert not found["round"].duplicated().any(), f"{metric} of {labels} names several cases"
    return found.set_index("round")["value"]


def now_sec(device: torch.device) -> float:
    """Time by the wall once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
