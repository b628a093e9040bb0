"""What length costs: time and memory of prompts of 1k to 64k tokens, bounded and not.

``python -m kvarena.harness.bench.growth`` writes results/bench/growth.csv, .md and -targets.csv.
Four layers with random weights: how cost grows does not depend on what a model has learned, and a
full cache of 64k tokens must end within minutes on a CPU. Sections: length (prompts, read by the
engine in chunks and by ``generate`` at once), cache (decoding steps over ever longer caches) and
slots (decoding side by side).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kvarena.harness.bench.engine_cases import decode, prefill
from kvarena.harness.bench.measure import TimedCase, select
from kvarena.harness.bench.peers import dynamic_cache_decode, generate_prefill
from kvarena.harness.bench.sections import Section, chosen, quiet_command, run_sections
from kvarena.harness.bench.subjects import Subject, long_context, toy
from kvarena.harness.bench.targets import TARGET_COLUMNS, check

SECTIONS = ("length", "cache", "slots")
_POLICY = "keydiff"


@dataclass(frozen=True, kw_only=True)
class GrowthSizes:
    """Units: tokens, unless the name says otherwise; see ``bench/sizes.py``.

    lengths: of prompts; caches: full ones of decoding steps; passes: timed at each visit.
    """

    name: str
    rounds: int
    budget_tokens: int
    chunk_tokens: int
    lengths: tuple[int, ...]
    caches: tuple[int, ...]
    slots: tuple[int, ...]
    passes: int


GROWTH = GrowthSizes(
    name="growth",
    rounds=2,
    budget_tokens=512,
    chunk_tokens=128,
    lengths=(1000, 2000, 4000, 8000, 16000, 32000, 64000),
    caches=(1000, 2000, 4000, 8000, 16000, 32000, 64000),
    slots=(1, 2, 4, 8, 16),
    passes=8,
)
TOY = GrowthSizes(
    name="growth-toy",
    rounds=1,
    budget_tokens=48,
    chunk_tokens=16,
    lengths=(100, 200, 400),
    caches=(48, 100),
    slots=(1, 2),
    passes=2,
)


def sections(subject: Subject, sizes: GrowthSizes) -> dict[str, Section]:
    """What ``--only`` can name, in the order of a whole run."""
    return {
        "length": Section(cases=lambda: by_length(subject, sizes), rounds=sizes.rounds),
        "cache": Section(cases=lambda: by_cache(subject, sizes), rounds=sizes.rounds),
        "slots": Section(cases=lambda: by_slots(subject, sizes), rounds=sizes.rounds),
    }


def by_length(subject: Subject, sizes: GrowthSizes) -> list[TimedCase]:
    """Prompts up to their first new token, with the peak of memory beside the model.

    The engine also writes some tokens after each, at its budget.
    """
    ours = [
        prefill(
            subject,
            _POLICY,
            section="length",
            prompt_tokens=prompt_tokens,
            budget_tokens=sizes.budget_tokens,
            chunk_tokens=sizes.chunk_tokens,
            # A shorter prompt stands for a long one elsewhere. Whether it may is measured here.
            whole=True,
        )
        for prompt_tokens in sizes.lengths
    ]
    return ours + [
        generate_prefill(subject, section="length", prompt_tokens=prompt_tokens)
        for prompt_tokens in sizes.lengths
    ]


def by_cache(subject: Subject, sizes: GrowthSizes) -> list[TimedCase]:
    """Steps at one slot over all tokens of ever longer texts."""

    subject.keys_and_values(sizes.caches[-1])  # once, and not anew for each longer one
    found = []
    for cache_tokens in sizes.caches:
        found.append(
            decode(
                subject,
                "full",
                section="cache",
                slots=1,
                cache_tokens=cache_tokens,
                passes=sizes.passes,
            )
        )
        found.append(
            dynamic_cache_decode(
                subject, section="cache", slots=1, cache_tokens=cache_tokens, passes=sizes.passes
            )
        )
    return found


def by_slots(subject: Subject, sizes: GrowthSizes) -> list[TimedCase]:
    """Steps at the budget, with ever more sequences side by side."""
    return [
        decode(
            subject,
            _POLICY,
            section="slots",
            slots=slots,
            cache_tokens=sizes.budget_tokens,
            passes=sizes.passes,
        )
        for slots in sizes.slots
    ]


def targets(measured: pd.DataFrame, sizes: GrowthSizes) -> pd.DataFrame:
    """One line per figure of which both sides were measured."""
    return pd.DataFrame(
        [line for line in _figures(measured, sizes) if line], columns=TARGET_COLUMNS
    )


def _figures(measured: pd.DataFrame, sizes: GrowthSizes) -> Iterator[dict[str, object]]:
    def by_size(metric: str, system: str, lengths: tuple[int, ...]) -> list[pd.Series]:
        return [
            select(measured, metric, section="length", system=system, prompt_tokens=length)
            for length in lengths
        ]

    # Short prompts are all overhead, or no longer than the budget.
    long = sizes.lengths[len(sizes.lengths) // 2 - 1 :]
    span = f"{long[0]} to {long[-1]} tokens"
    for system, most in (("kvarena", 1.05), ("generate", None)):
        yield check(
            f"exponent of time in length, {system}, {span}",
            _exponent(long, by_size("ttft_sec", system, long)),
            at_most=most,
        )
        memory = by_size("peak_extra_bytes", system, (long[0], long[-1]))
        yield check(
            f"peak memory at {long[-1]} over {long[0]} tokens, {system}",
            memory[1] / memory[0],
            at_most=1.1 if most else None,
        )
    steps = by_size("pass_sec", "kvarena", (long[0], long[-1]))
    yield check(
        f"decoding step after {long[-1]} over {long[0]} tokens, kvarena",
        steps[1] / steps[0],
        at_most=1.1,
    )


def _exponent(lengths: tuple[int, ...], times: list[pd.Series]) -> pd.Series:
    """By round the slope of time over length, both as logarithms."""
    by_round = pd.concat(times, axis=1).dropna()
    if by_round.empty or by_round.shape[1] < len(lengths):
        return pd.Series(dtype=float)
    return by_round.apply(
        lambda own: np.polyfit(np.log(lengths), np.log(own.to_numpy()), 1)[0], axis=1
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m kvarena.harness.bench.growth", description=__doc__
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument("--only", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--results", type=Path, default=Path("results/bench"), metavar="FOLDER")
    with quiet_command():
        options = parser.parse_args()
        sizes = TOY if options.toy else GROWTH
        subject = toy() if options.toy else long_context()
        wanted = chosen(sections(subject, sizes), options.only)
        stem = options.results / sizes.name
        print(run_sections(subject, wanted, lambda measured: targets(measured, sizes), stem))


if __name__ == "__main__":
    main()
