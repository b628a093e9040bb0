"""The bench: how fast the engine is on the present machine, beside what others do there.

``python -m kvarena.harness.bench`` writes results/bench/<name>.csv, .md and -targets.csv and prints
the Markdown. All of a section's variants are measured in interleaved rounds; see results/README.md
for the columns.
"""

import argparse
import contextlib
from pathlib import Path

from kvarena.harness.bench.jobs import jobs
from kvarena.harness.bench.measure import Case, Variant
from kvarena.harness.bench.peers import (
    KvpressServer,
    dynamic_cache_decode,
    generate_prefill,
    kvpress_prefill,
)
from kvarena.harness.bench.phases import phases
from kvarena.harness.bench.roofline import roofline
from kvarena.harness.bench.sections import Section, chosen, quiet_command, run_sections
from kvarena.harness.bench.sizes import CHIEF, DEFAULT, FULL, QUICK, Plan, evicting_policies
from kvarena.harness.bench.speed import decode, prefill
from kvarena.harness.bench.subjects import Subject, bundled_model, toy
from kvarena.harness.bench.targets import targets

SECTIONS = ("prefill", "decode", "policies", "phases", "job", "roofline")


def prefills(subject: Subject, plan: Plan, kvpress: KvpressServer | None) -> list[Variant]:
    """By prompt length, in chunks of both widths, and by the peers at once."""
    budget_tokens = plan.budget_tokens

    def ours(policy: str, prompt_tokens: int, chunk_tokens: int) -> Variant:
        return prefill(
            subject,
            policy,
            section="prefill",
            prompt_tokens=prompt_tokens,
            budget_tokens=budget_tokens,
            chunk_tokens=chunk_tokens,
        )

    longest, wide = plan.wide_lengths[-1], plan.wide_chunk_tokens
    found = [ours(policy, n, plan.chunk_tokens) for n in plan.lengths for policy in CHIEF]
    found += [ours(policy, n, wide) for n in plan.wide_lengths for policy in CHIEF]
    others = [name for name in evicting_policies(see_attention=False) if name not in CHIEF]
    found += [ours(policy, longest, wide) for policy in others]
    for prompt_tokens in plan.wide_lengths:
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
                chunk_tokens=plan.chunk_tokens,
                slots=1,
            )
            found.append(kvpress_prefill(kvpress, subject, case))
    return found


def decodes(subject: Subject, plan: Plan) -> list[Variant]:
    """By slots and cache: evicting at every token, full attention, and DynamicCache."""
    found = []
    for cache_tokens in plan.caches:
        for slots in plan.slots:
            found += [
                decode(
                    subject,
                    policy,
                    section="decode",
                    slots=slots,
                    cache_tokens=cache_tokens,
                    passes=plan.passes,
                )
                for policy in (*CHIEF, "full")
            ]
            found.append(
                dynamic_cache_decode(
                    subject,
                    section="decode",
                    slots=slots,
                    cache_tokens=cache_tokens,
                    passes=plan.passes,
                )
            )
    return found


def policies(subject: Subject, plan: Plan) -> list[Variant]:
    """Each policy beside the others: a whole prefill, and decode steps at equal cache length."""
    found = [
        prefill(
            subject,
            policy,
            section="policies",
            prompt_tokens=plan.policy_length,
            budget_tokens=plan.budget_tokens,
            chunk_tokens=plan.chunk_tokens,
        )
        for policy in evicting_policies()
    ]
    found += [
        decode(
            subject,
            policy,
            section="policies",
            slots=slots,
            cache_tokens=cache_tokens,
            passes=plan.passes,
        )
        for slots, cache_tokens in plan.policy_shapes
        for policy in ("full", *evicting_policies())
    ]
    return found


def sections(
    subject: Subject, plan: Plan, kvpress: KvpressServer | None = None
) -> dict[str, Section]:
    """What ``--only`` can name, in the order of a whole run."""
    return {
        "prefill": Section(variants=lambda: prefills(subject, plan, kvpress), rounds=plan.rounds),
        "decode": Section(variants=lambda: decodes(subject, plan), rounds=plan.rounds),
        "policies": Section(variants=lambda: policies(subject, plan), rounds=plan.rounds),
        "phases": Section(variants=lambda: phases(subject, plan), rounds=plan.rounds),
        "job": Section(variants=lambda: jobs(subject, plan, kvpress), rounds=plan.job_rounds),
        "roofline": Section(variants=lambda: roofline(subject, plan), rounds=plan.rounds),
    }


def main() -> None:
    """Parse, run, print; exit code 2 for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m kvarena.harness.bench", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a toy model: does it run at all?")
    size.add_argument("--full", action="store_true", help="jobs of 32 prompts and more rounds")
    parser.add_argument("--only", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--kvpress-python", metavar="FILE", help="an interpreter that has kvpress")
    parser.add_argument("--results", type=Path, default=Path("results/bench"), metavar="FOLDER")
    with quiet_command(), contextlib.ExitStack() as stack:
        options = parser.parse_args()
        plan = QUICK if options.quick else FULL if options.full else DEFAULT
        subject = toy() if options.quick else bundled_model()
        kvpress = None
        if options.kvpress_python:
            kvpress = stack.enter_context(KvpressServer(options.kvpress_python, subject.folder))
        wanted = chosen(sections(subject, plan, kvpress), options.only)
        stem = options.results / "-".join(filter(None, (plan.name, options.only)))
        print(run_sections(subject, wanted, lambda measured: targets(measured, plan), stem))


if __name__ == "__main__":
    main()
