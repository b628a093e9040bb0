"""The bench: how fast the engine is on the present machine, beside what others do there.

``python -m kvarena.harness.bench`` writes results/bench/<name>.csv, .md and -targets.csv and prints
the Markdown. All of a section's cases are measured in interleaved rounds; see results/README.md
for the columns.
"""

import argparse
import contextlib
from pathlib import Path

from kvarena.harness.bench.codecs import codecs
from kvarena.harness.bench.dtypes import dtypes
from kvarena.harness.bench.engine_cases import decode, prefill
from kvarena.harness.bench.jobs import jobs
from kvarena.harness.bench.measure import Case, TimedCase
from kvarena.harness.bench.neighbour import neighbour
from kvarena.harness.bench.peers import (
    KvpressServer,
    dynamic_cache_decode,
    generate_prefill,
    kvpress_prefill,
)
from kvarena.harness.bench.phases import phases
from kvarena.harness.bench.roofline import roofline
from kvarena.harness.bench.sections import Section, chosen, quiet_command, run_sections
from kvarena.harness.bench.sizes import CHIEF, DEFAULT, FULL, QUICK, Sizes
from kvarena.harness.bench.subjects import BUNDLED_MODEL, Subject, of_name
from kvarena.harness.bench.targets import targets

SECTIONS = (
    "prefill",
    "decode",
    "policies",
    "codecs",
    "phases",
    "job",
    "roofline",
    "dtypes",
    "neighbour",
)


def prefills(subject: Subject, sizes: Sizes, kvpress: KvpressServer | None) -> list[TimedCase]:
    """By prompt length, in chunks of both widths, and by the peers at once."""
    budget_tokens = sizes.budget_tokens

    def ours(policy: str, prompt_tokens: int, chunk_tokens: int) -> TimedCase:
        return prefill(
            subject,
            policy,
            section="prefill",
            prompt_tokens=prompt_tokens,
            budget_tokens=budget_tokens,
            chunk_tokens=chunk_tokens,
        )

    longest, wide = sizes.wide_lengths[-1], sizes.wide_chunk_tokens
    found = [ours(policy, n, sizes.chunk_tokens) for n in sizes.lengths for policy in CHIEF]
    found += [ours(policy, n, wide) for n in sizes.wide_lengths for policy in CHIEF]
    others = [name for name in sizes.evicting(see_attention=False) if name not in CHIEF]
    found += [ours(policy, longest, wide) for policy in others]
    for prompt_tokens in sizes.wide_lengths:
        found.append(generate_prefill(subject, section="prefill", prompt_tokens=prompt_tokens))
        if kvpress is not None:
            case = Case(
                section="prefill",
                what="prefill",
                system="kvpress",
                policy="keydiff",
                attention="sdpa",
                prompt_tokens=prompt_tokens,
                budget_tokens=budget_tokens,
                chunk_tokens=sizes.chunk_tokens,
                slots=1,
            )
            found.append(kvpress_prefill(kvpress, subject, case))
    return found


def decodes(subject: Subject, sizes: Sizes) -> list[TimedCase]:
    """By slots and cache: evicting at every token, full attention, and DynamicCache."""
    found = []
    for cache_tokens in sizes.caches:
        for slots in sizes.slots:
            found += [
                decode(
                    subject,
                    policy,
                    section="decode",
                    slots=slots,
                    cache_tokens=cache_tokens,
                    passes=sizes.passes,
                )
                for policy in (*CHIEF, "full")
            ]
            found.append(
                dynamic_cache_decode(
                    subject,
                    section="decode",
                    slots=slots,
                    cache_tokens=cache_tokens,
                    passes=sizes.passes,
                )
            )
    return found


def policies(subject: Subject, sizes: Sizes) -> list[TimedCase]:
    """Each policy beside the others: a whole prefill, and decode steps at equal cache length."""
    found = [
        prefill(
            subject,
            policy,
            section="policies",
            prompt_tokens=sizes.policy_length,
            budget_tokens=sizes.budget_tokens,
            chunk_tokens=sizes.chunk_tokens,
        )
        for policy in sizes.evicting()
    ]
    rhythms = [("full", 1)]
    rhythms += [(policy, every) for every in sizes.evict_every for policy in sizes.evicting()]
    found += [
        decode(
            subject,
            policy,
            section="policies",
            slots=slots,
            cache_tokens=cache_tokens,
            passes=max(sizes.passes, evict_every),
            evict_every=evict_every,
        )
        for slots, cache_tokens in sizes.policy_shapes
        for policy, evict_every in rhythms
    ]
    return found


def sections(
    subject: Subject,
    sizes: Sizes,
    stack: contextlib.ExitStack,
    kvpress: KvpressServer | None = None,
) -> dict[str, Section]:
    """What ``--only`` can name, in the order of a whole run; processes end with ``stack``."""
    return {
        "prefill": Section(cases=lambda: prefills(subject, sizes, kvpress), rounds=sizes.rounds),
        "decode": Section(cases=lambda: decodes(subject, sizes), rounds=sizes.rounds),
        "policies": Section(cases=lambda: policies(subject, sizes), rounds=sizes.rounds),
        "codecs": Section(cases=lambda: codecs(subject, sizes), rounds=sizes.rounds),
        "phases": Section(cases=lambda: phases(subject, sizes), rounds=sizes.rounds),
        "job": Section(cases=lambda: jobs(subject, sizes, kvpress), rounds=sizes.job_rounds),
        "roofline": Section(cases=lambda: roofline(subject, sizes), rounds=sizes.rounds),
        "dtypes": Section(cases=lambda: dtypes(subject, sizes), rounds=sizes.rounds),
        "neighbour": Section(cases=lambda: neighbour(subject, sizes, stack), rounds=sizes.rounds),
    }


def main() -> None:
    """Parse, run, print; exit code 2 for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m kvarena.harness.bench", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a toy model: does it run at all?")
    size.add_argument("--full", action="store_true", help="jobs of 32 prompts and more rounds")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--also", metavar="POLICY", help="more policies to measure: a,b")
    parser.add_argument("--only", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--kvpress-python", metavar="FILE", help="an interpreter that has kvpress")
    parser.add_argument("--results", type=Path, default=Path("results/bench"), metavar="FOLDER")
    with quiet_command(), contextlib.ExitStack() as stack:
        options = parser.parse_args()
        sizes = QUICK if options.quick else FULL if options.full else DEFAULT
        sizes = sizes.with_policies(options.also)
        subject = of_name("toy" if options.quick else BUNDLED_MODEL, options.dtype)
        kvpress = None
        if options.kvpress_python:
            kvpress = stack.enter_context(KvpressServer(options.kvpress_python, subject.folder))
        wanted = chosen(sections(subject, sizes, stack, kvpress), options.only)
        dtype = options.dtype if options.dtype != "float32" else None
        stem = options.results / "-".join(filter(None, (sizes.name, dtype)))
        print(
            run_sections(
                subject, wanted, lambda measured: targets(measured, sizes, options.dtype), stem
            )
        )


if __name__ == "__main__":
    main()
