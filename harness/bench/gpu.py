"""The bench on a CUDA device: Llama-3.1-8B's shape with random weights, in bfloat16.

``python -m kvarena.harness.bench.gpu`` writes results/bench/gpu.csv, .md and -targets.csv. Speed
does not need real weights. ``--device cpu --toy`` runs the same code on a tiny model, to see that
it works. Sections: prefill (time to first token), roofline (passes at steady state against the
card's rates), end_to_end (prompt and answer, also with attention written out: attention=reference).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kvarena.harness.bench.engine_cases import prefill
from kvarena.harness.bench.measure import Case, TimedCase, now_sec, select
from kvarena.harness.bench.roofline import POLICY, machine, rated_pass
from kvarena.harness.bench.sections import Section, chosen, quiet_command, run_sections
from kvarena.harness.bench.sizes import Measured
from kvarena.harness.bench.subjects import Subject, llama_8b, toy
from kvarena.harness.bench.targets import TARGET_COLUMNS, check
from kvarena.harness.engine import Engine
from kvarena.harness.errors import UsageError
from kvarena.harness.models.devices import check_device
from kvarena.harness.registry import build, load_choice

SECTIONS = ("prefill", "roofline", "end_to_end")


@dataclass(frozen=True, kw_only=True)
class GpuSizes(Measured):
    """Units: tokens, unless the name says otherwise; see ``bench/sizes.py``.

    budgets: N; end_tokens: prompt and answer of end_to_end, under the first of the budgets.
    """

    name: str
    rounds: int
    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    chunk_tokens: int
    slots: tuple[int, ...]
    passes: int
    end_tokens: tuple[int, int]
    matmul_rows: int
    stream_floats: int


GPU = GpuSizes(
    name="gpu",
    rounds=3,
    lengths=(8000, 32000, 128000),
    budgets=(2048, 8192),
    chunk_tokens=1024,
    slots=(1, 8),
    passes=8,
    end_tokens=(32000, 256),
    matmul_rows=8192,
    stream_floats=2**28,
)
TOY = GpuSizes(
    name="gpu-toy",
    rounds=2,
    lengths=(128, 256),
    budgets=(48, 64),
    chunk_tokens=16,
    slots=(1, 2),
    passes=2,
    end_tokens=(128, 4),
    matmul_rows=64,
    stream_floats=2**16,
)


def sections(subject: Subject, sizes: GpuSizes) -> dict[str, Section]:
    """What ``--only`` can name, in the order of a whole run."""
    return {
        "prefill": Section(cases=lambda: prefills(subject, sizes), rounds=sizes.rounds),
        "roofline": Section(cases=lambda: passes(subject, sizes), rounds=sizes.rounds),
        "end_to_end": Section(cases=lambda: end_to_end(subject, sizes), rounds=sizes.rounds),
    }


def prefills(subject: Subject, sizes: GpuSizes) -> list[TimedCase]:
    """Every policy at every length and budget, and the full cache."""
    wanted = [(policy, budget) for budget in sizes.budgets for policy in sizes.evicting()]
    return [
        prefill(
            subject,
            policy,
            section="prefill",
            prompt_tokens=prompt_tokens,
            budget_tokens=budget_tokens,
            chunk_tokens=sizes.chunk_tokens,
        )
        for prompt_tokens in sizes.lengths
        for policy, budget_tokens in [("full", sizes.budgets[0]), *wanted]
    ]


def passes(subject: Subject, sizes: GpuSizes) -> list[TimedCase]:
    """Passes that write a token, for every policy, and passes that read a chunk in all slots."""
    found = machine(subject, sizes.matmul_rows, sizes.stream_floats)
    for cache_tokens in sizes.budgets:
        for slots in sizes.slots:
            shape = {"slots": slots, "cache_tokens": cache_tokens, "passes": sizes.passes}
            found.append(
                rated_pass(subject, policy=POLICY, chunk_tokens=sizes.chunk_tokens, **shape)
            )
            found += [
                rated_pass(subject, policy=name, **shape) for name in ("full", *sizes.evicting())
            ]
    return found


def end_to_end(subject: Subject, sizes: GpuSizes) -> list[TimedCase]:
    """A prompt and its answer at one slot; on CUDA also with decoding steps as CUDA graphs."""
    # Without a fast way, to look at attention weights means attention written out.
    written_out = [(policy, "reference") for policy in sizes.evicting(see_attention=True)]
    found = [
        _answer(subject, sizes, policy, attention)
        for policy, attention in [
            *((policy, "sdpa") for policy in sizes.evicting()),
            *written_out,
        ]
    ]
    if subject.device.type == "cuda":
        found += [
            _answer(subject, sizes, policy, "sdpa", graphs=True) for policy in sizes.evicting()
        ]
    return found


def _answer(
    subject: Subject, sizes: GpuSizes, policy: str, attention: str, *, graphs: bool = False
) -> TimedCase:
    prompt_tokens, new_tokens = sizes.end_tokens

    def run(num_prompt: int, num_new: int) -> dict[str, float]:
        engine = Engine(
            subject.model,
            build(load_choice("policy", policy)),
            budget_tokens=sizes.budgets[0],
            chunk_tokens=sizes.chunk_tokens,
            slots=1,
            attention=attention,
            graphs=graphs,
        )
        started = now_sec(subject.device)
        list(engine.generate([subject.text[:num_prompt]], max_new_tokens=num_new))
        return {"end_to_end_sec": now_sec(subject.device) - started}

    def warm() -> dict[str, float]:
        run(min(prompt_tokens, sizes.budgets[0] + 2 * sizes.chunk_tokens), 2)
        return {}

    return TimedCase(
        case=Case(
            section="end_to_end",
            what="end_to_end",
            system="kvarena_graphs" if graphs else "kvarena",
            policy=policy,
            attention=attention,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            budget_tokens=sizes.budgets[0],
            chunk_tokens=sizes.chunk_tokens,
            slots=1,
        ),
        run=lambda: run(prompt_tokens, new_tokens),
        warm=warm,
    )


def targets(measured: pd.DataFrame, sizes: GpuSizes) -> pd.DataFrame:
    """One line per figure of which both sides were measured."""
    return pd.DataFrame(
        [line for line in _figures(measured, sizes) if line], columns=TARGET_COLUMNS
    )


def _figures(measured: pd.DataFrame, sizes: GpuSizes) -> Iterator[dict[str, object]]:
    longest = sizes.lengths[-1]
    for budget_tokens in sizes.budgets:
        sec = {
            policy: select(
                measured,
                "ttft_sec",
                section="prefill",
                policy=policy,
                prompt_tokens=longest,
                budget_tokens=budget_tokens,
            )
            for policy in ("streaming_llm", "keydiff", "h2o")
        }
        for policy, bound in (("keydiff", 1.02), ("h2o", 1.30)):
            yield check(
                f"TTFT at {longest} tokens, {policy} over streaming_llm, N {budget_tokens}",
                sec[policy] / sec["streaming_llm"],
                at_most=bound,
            )
    for cache_tokens in sizes.budgets:
        shape = {"section": "roofline", "policy": POLICY, "cache_tokens": cache_tokens}
        reached = select(measured, "of_bandwidth_ratio", what="decode", slots=1, **shape)
        yield check(
            f"decode step over (weights + KV bytes) / bandwidth, 1 slot, cache {cache_tokens}",
            1 / reached,
            at_most=1.3,
        )
        slots = sizes.slots[-1]
        reached = select(measured, "of_matmul_rate_ratio", what="prefill", slots=slots, **shape)
        yield check(
            f"prefill's share of the matrix-product rate, {slots} slots, N {cache_tokens}",
            reached,
            at_least=0.5,
        )
    eager = measured[measured["system"] == "kvarena"]
    ours = select(eager, "end_to_end_sec", policy="keydiff", attention="sdpa")
    for attention in ("reference", "sdpa"):
        for policy in sizes.evicting(see_attention=True):
            theirs = select(eager, "end_to_end_sec", policy=policy, attention=attention)
            yield check(
                f"prompt and answer, {policy} with attention={attention} over keydiff",
                theirs / ours,
                at_least=1.3 if attention == "reference" else None,
            )


def main() -> None:
    """Parse, run, print; exit code 2 without a CUDA device."""
    parser = argparse.ArgumentParser(
        prog="python -m kvarena.harness.bench.gpu", description=__doc__
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --toy")
    parser.add_argument("--toy", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument("--also", metavar="POLICY", help="more policies to measure: a,b")
    parser.add_argument("--only", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--results", type=Path, default=Path("results/bench"), metavar="FOLDER")
    with quiet_command():
        options = parser.parse_args()
        check_device(options.device)
        if options.device == "cpu" and not options.toy:
            raise UsageError("device=cpu is too slow for the 8B shape; add --toy or use cuda")
        sizes = (TOY if options.toy else GPU).with_policies(options.also)
        subject = (toy if options.toy else llama_8b)(options.device)
        wanted = chosen(sections(subject, sizes), options.only)
        stem = options.results / sizes.name
        print(run_sections(subject, wanted, lambda measured: targets(measured, sizes), stem))


if __name__ == "__main__":
    main()
